"""What can go wrong through no fault of the program.

Every message is one line that says what was wrong, what was expected and what to do. The commands print it and
exit with status 2; anything else that reaches a user is a bug of this project.
"""


class CaptionerError(Exception):
    """Something a user gave, or something the machine lacks, makes the request impossible."""


class AnnotationError(CaptionerError):
    """A caption file cannot be read, or says things that cannot be true together."""


class ImageError(CaptionerError):
    """A file is not a photo that can be decoded.

    Attributes:
        kind: the class of the fault, for lists of failures: "missing", "unreadable", "special" (a pipe or a device),
            "not a photo", "damaged", "too large", "unsupported", "timeout" or "existing".
    """

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        """State the fault in one line."""
        super().__init__(message)
        self.kind = kind


class WeightsError(CaptionerError):
    """Weights of a CNN are not there, or belong to another network."""


class CheckpointError(CaptionerError):
    """A saved model is missing, incomplete, altered, or made by another version."""


class FeatureStoreError(CaptionerError):
    """Stored features do not belong to the request, or the store is damaged or in use."""

"""The errors that a user can mend: wrong input, or a machine that lacks something.

Every message is one line that says what was wrong, what was expected and what to do. The commands print it and
exit with status 2; anything else that reaches a user is a bug of this project.
"""

from __future__ import annotations


def printable(text: object) -> str:
    """Text for a terminal: line breaks, escapes and marks that turn the direction of writing are spelled out.

    Names of files, words of a stranger's model and messages of libraries may hold any of these.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


class CaptionerError(Exception):
    """Something a user gave, or something the machine lacks, makes the request impossible."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class AnnotationError(CaptionerError):
    """A caption file cannot be read, or says things that cannot be true together."""


class ImageError(CaptionerError):
    """A file is not a photo that can be decoded.

    Attributes:
        kind: the class of the fault, for lists of failures: "missing", "unreadable", "special" (a pipe or a device),
            "not a photo", "damaged", "too large", "unsupported", "timeout", "existing" or "changed".
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


def missing_extra(extra: str, package: str) -> CaptionerError:
    """The error to raise where a package of an extra is needed and not installed.

    Args:
        extra: name of the extra in pyproject.toml, "train" say.
        package: the package that could not be imported.
    """
    return CaptionerError(f"{package} is not installed; pip install 'captioner[{extra}]'")

"""The captioner: a model that looks at photos and writes sentences, with the words that it knows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from captioner import checkpoint, hub, images
from captioner.config import DecodingOptions
from captioner.decoding.explain import Explanation, explain
from captioner.decoding.search import Hypothesis, decode
from captioner.decoding.step import StepModel
from captioner.errors import CaptionerError, CheckpointError
from captioner.runtime import OnnxEngine
from captioner.vocabulary import Vocabulary, join

if TYPE_CHECKING:
    from captioner.config import Precision

EngineName = Literal["auto", "onnx", "torch"]


class Engine(StepModel, Protocol):
    """The network of a model: it looks, and it writes word by word."""

    @property
    def image_size(self) -> int:
        """Height and width of the photos that it looks at, in pixels."""
        ...

    def features(self, photos: npt.NDArray[np.uint8], /) -> npt.NDArray[np.float32]:
        """Look at photos, `(photos, 3, height, width)`, RGB, 0 to 255; 4096 numbers each."""
        ...


@dataclass(frozen=True)
class Caption:
    """A sentence about a photo."""

    text: str
    tokens: tuple[str, ...]  # the words, as the decoder wrote them
    logprob: float  # natural log of the caption's probability given the photo
    score: float  # the number that captions are ranked by: the log-probability after length normalisation
    finished: bool  # ended by the model, rather than cut at the longest length
    satisfied: bool  # has every required word

    def __str__(self) -> str:
        return self.text


class Captioner:
    """Looks at photos and writes sentences about them.

    Several threads may use one captioner at once where its engine is onnxruntime's.
    """

    def __init__(
        self,
        engine: Engine,
        vocabulary: Vocabulary,
        options: DecodingOptions | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Put a model together.

        Args:
            engine: the network: `networks.inference.TorchEngine`, or `runtime.OnnxEngine`.
            vocabulary: ids of words -> text.
            options: how captions are searched for.
            training: how the model was made, in JSON's types; it is saved with it and told in its model card.
        """
        self.engine = engine
        self.vocabulary = vocabulary
        self.options = options or DecodingOptions()
        self.training = dict(training or {})

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "mini",
        *,
        engine: EngineName = "auto",
        encoder_weights: str | None = None,
        device: str | None = None,
        precision: Precision = "auto",
    ) -> Captioner:
        """Load a saved model.

        Args:
            model: its folder, the folder of a training run (its best checkpoint is taken), `owner/name` on the
                Hugging Face Hub, or "mini", which comes with this package.
            engine: "onnx" runs the graphs of an exported model, "torch" its weights; "auto" takes the graphs where
                the model has them and nothing that follows asks for torch.
            encoder_weights: the file of the CNN's weights, if it is not where the model says; needs torch.
            device: of torch, such as "cuda"; by default a GPU if there is one.
            precision: of torch's arithmetic, see `networks.inference.TorchEngine`.

        Raises:
            CheckpointError: the model is missing, incomplete or altered; it was not exported, and torch is not
                installed; the encoder's weights are not those that it was trained with.
            WeightsError: the encoder's weights are not there.
            CaptionerError: the arguments contradict each other.
        """
        if engine not in get_args(EngineName):
            raise CaptionerError(f"engine is {engine!r}; expected one of {', '.join(get_args(EngineName))}")
        wants_torch = encoder_weights is not None or device is not None or precision != "auto"
        if engine == "onnx" and wants_torch:
            raise CaptionerError(
                "encoder weights, a device and a precision are settings of the engine torch; leave them out, or take it"
            )
        folder = hub.find(model)
        if engine == "onnx" or (engine == "auto" and not wants_torch):
            saved = checkpoint.read(folder, weights=False)
            if saved.export is not None or engine == "onnx":
                checkpoint.check_graphs(folder, saved)
                return cls(_onnx(folder, saved), saved.vocabulary, saved.decoding, saved.training)
        try:
            from captioner.networks import storage
        except ImportError as error:
            raise CheckpointError(
                f"{folder}: was not exported for use without torch, and {error.name} is not installed; where torch is, "
                f"run `captioner export {folder}`, or install it here: pip install 'captioner[train]'"
            ) from None
        saved = checkpoint.read(folder)
        network = storage.load(folder, saved, encoder_weights=encoder_weights, device=device, precision=precision)
        return cls(network, saved.vocabulary, saved.decoding, saved.training)

    @property
    def image_size(self) -> int:
        """Height and width of the photos that the model looks at, in pixels."""
        return self.engine.image_size

    @property
    def concurrent(self) -> bool:
        """Whether several threads may use the model at once, and gain by it."""
        return isinstance(self.engine, OnnxEngine)

    @property
    def engine_name(self) -> str:
        """What computes, and how precisely: "onnx" (as the model was exported), or "torch, bfloat16" for example."""
        if isinstance(self.engine, OnnxEngine):
            return "onnx"
        precision = str(getattr(self.engine, "dtype", "unknown precision"))
        return f"torch, {precision.removeprefix('torch.')}"

    def caption(self, photo: images.Source, options: DecodingOptions | None = None) -> Caption:
        """Write the best sentence about one photo.

        Args:
            photo: a file, or an image in memory: see `images.load`.
            options: how to search; by default as the model was validated.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        return self.captions(photo, options)[0]

    def captions(self, photo: images.Source, options: DecodingOptions | None = None) -> list[Caption]:
        """Write `options.num_captions` sentences about one photo, best first; see `caption`."""
        return self.describe(self._look(photo), options)[0]

    def features(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Look at photos.

        Args:
            photos: RGB, 0 to 255, `(photos, 3, image_size, image_size)`, as `images.load` gives them.

        Returns:
            4096 numbers a photo, `(photos, 4096)`.
        """
        return self.engine.features(photos)

    def describe(
        self, features: npt.NDArray[np.float32], options: DecodingOptions | None = None, *, workers: int = 1
    ) -> list[list[Caption]]:
        """Write captions from features.

        Args:
            features: `(photos, 4096)`.
            options: how to search; by default as the model was validated.
            workers: threads that search at once; more than 1 are of use to onnxruntime alone.

        Returns:
            `options.num_captions` captions a photo, best first.
        """
        hypotheses = decode(self.engine, features, self.vocabulary, options or self.options, workers)
        return [[self._caption(hypothesis) for hypothesis in found] for found in hypotheses]

    def _caption(self, found: Hypothesis) -> Caption:
        words = self.vocabulary.words(found.tokens)
        return Caption(join(words), tuple(words), found.logprob, found.score, found.finished, found.satisfied)

    def explain(self, photo: images.Source, options: DecodingOptions | None = None) -> Explanation:
        """Caption one photo and keep how the search went; see `caption`."""
        return explain(self.engine, self._look(photo), self.vocabulary, options or self.options)

    def _look(self, photo: images.Source) -> npt.NDArray[np.float32]:
        return self.features(images.load(photo, self.image_size)[None])

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as a folder; a model that is there already is replaced as a whole.

        A model that runs in onnxruntime is copied with its graphs; one that runs in torch is written without graphs,
        see `captioner export`.

        Raises:
            CheckpointError: it cannot be written, or the folder holds anything but a model; it stays as it was.
        """
        folder = Path(folder).absolute()
        if foreign := checkpoint.foreign(folder):
            raise CheckpointError(f"{folder}: holds files that are not of a model ({foreign}); choose another folder")
        with checkpoint.replacing(folder) as new:
            self.write(new)

    def write(self, folder: Path) -> None:
        """Write the model's files into a folder that exists."""
        if isinstance(self.engine, OnnxEngine):
            shutil.copytree(self.engine.folder.parent, folder, dirs_exist_ok=True)
            return
        from captioner.networks import storage
        from captioner.networks.inference import TorchEngine

        assert isinstance(self.engine, TorchEngine)
        saved = storage.checkpoint_of(self.engine, self.vocabulary, self.options, self.training)
        checkpoint.write(folder, saved, hub.model_card(saved))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub, and return its address.

        Raises:
            CheckpointError: the Hub cannot be reached, or refuses.
        """
        return hub.push(self.write, repo_id, private=private, token=token)


def _onnx(folder: Path, saved: checkpoint.Checkpoint) -> OnnxEngine:
    return OnnxEngine(
        folder / checkpoint.EXPORTED, image_size=saved.encoder.image_size, vocabulary_size=len(saved.vocabulary)
    )

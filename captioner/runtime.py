"""A saved model in onnxruntime: photos -> 4096 numbers -> first hidden state -> the likeliest next words.

The graphs are made by `captioner export`; onnxruntime and numpy run them, without torch. One engine may be used by
several threads at once, each of which then computes on its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captioner.checkpoint import ENCODER_GRAPH, START_GRAPH, STEP_GRAPH
from captioner.config import FEATURE_SIZE
from captioner.decoding.step import Likeliest, State
from captioner.errors import CheckpointError

#: Photos that the CNN looks at together: their maps should about stay in a processor's cache.
_TOGETHER = 8


class OnnxEngine:
    """A model that looks (`features`) and writes (`start`, `step`, `step_all`); see `decoding.step.StepModel`."""

    def __init__(self, folder: Path, *, image_size: int, vocabulary_size: int, threads: int = 1) -> None:
        """Load the graphs.

        Args:
            folder: that of the graphs, checked beforehand: see `checkpoint.check_graphs`.
            image_size: height and width of photos, in pixels.
            vocabulary_size: words that the decoder knows.
            threads: that work on one call together. Where many photos are captioned, one is best: calls from several
                threads then share nothing but the weights.

        Raises:
            CheckpointError: onnxruntime cannot load a graph.
        """
        self.folder, self.threads = folder, threads
        self.image_size, self.vocabulary_size = image_size, vocabulary_size
        self._encoder, self._start, self._step = (
            self._session(folder / name) for name in (ENCODER_GRAPH, START_GRAPH, STEP_GRAPH)
        )
        self._parts = [output.name for output in self._start.get_outputs()]
        following = [f"next_{part}" for part in self._parts]
        self._all, self._few = ["logits", *following], ["logprob", "word", "named_logprob", *following]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process loads the graphs again."""
        return _again, (self.folder, self.image_size, self.vocabulary_size, self.threads)

    def _session(self, path: Path) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised too
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of onnxruntime, whose types it does not publish
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if "alloc" in reason:
                raise MemoryError from None
            raise CheckpointError(f"{path}: cannot be loaded ({reason}); export the model again") from None

    def features(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Look at photos.

        Args:
            photos: RGB, 0 to 255, `(photos, 3, height, width)`, as `images.load` gives them.

        Returns:
            `(photos, 4096)`. The numbers of a photo do not depend on the photos beside it.
        """
        found = np.empty((len(photos), FEATURE_SIZE), np.float32)
        for first in range(0, len(photos), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            (found[some],) = self._encoder.run(None, {"photos": photos[some]})
        return found

    def start(self, features: npt.NDArray[np.float32]) -> State:
        """The hidden state that a photo sets.

        Args:
            features: `(photos, 4096)`.

        Returns:
            Arrays, one a layer and part of the hidden state, `(photos, hidden)`.
        """
        return tuple(self._start.run(self._parts, {"features": features}))

    def step(
        self,
        tokens: npt.NDArray[np.int64],
        parents: npt.NDArray[np.int64],
        state: State,
        count: int,
        named: npt.NDArray[np.int64],
    ) -> tuple[Likeliest, State]:
        """Read one word a row; the likeliest words to follow: see `decoding.step.StepModel`."""
        inputs = self._inputs(tokens, parents, state, count, named)
        logprob, word, asked, *following = self._step.run(self._few, inputs)
        return Likeliest(logprob, word, asked), tuple(following)

    def step_all(
        self, tokens: npt.NDArray[np.int64], parents: npt.NDArray[np.int64], state: State
    ) -> tuple[npt.NDArray[np.float32], State]:
        """Read one word a row; the log-probabilities of all words: see `decoding.step.StepModel`."""
        inputs = self._inputs(tokens, parents, state, 1, tokens[:0])
        logits, *following = self._step.run(self._all, inputs)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits, tuple(following)

    def _inputs(
        self,
        tokens: npt.NDArray[np.int64],
        parents: npt.NDArray[np.int64],
        state: State,
        count: int,
        named: npt.NDArray[np.int64],
    ) -> dict[str, npt.NDArray[Any]]:
        words = {"tokens": tokens, "parents": parents, "count": np.array([count]), "named": named}
        return {**words, **dict(zip(self._parts, state, strict=True))}


def _again(folder: Path, image_size: int, vocabulary_size: int, threads: int) -> OnnxEngine:
    return OnnxEngine(folder, image_size=image_size, vocabulary_size=vocabulary_size, threads=threads)

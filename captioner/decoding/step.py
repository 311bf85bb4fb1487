"""The contract between a search and a model: the questions that a search asks, and the answers that it gets.

Only a model knows where its state lives, be it in onnxruntime, in a processor's memory or on a GPU. A search holds
states without looking into them, and gets a few numbers a row: the likeliest words and the words that it named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

#: The hidden state of some rows. A search only hands it back to the model that it came from.
State = Any

_FEW = 512  # numbers of a row that are sorted faster than divided into large and small ones first


class Likeliest(NamedTuple):
    """The next word of each row: natural log-probabilities of a softmax over the whole vocabulary."""

    logprob: Floats  # (rows, count), likeliest first; NaN in rows whose logits give no probabilities
    word: Integers  # (rows, count): their ids; of equally likely words the lower id first, if the model can order them
    named: Floats  # (rows, named): of the words that the search named


class StepModel(Protocol):
    """A model that writes captions word by word; several threads may ask it at once."""

    @property
    def vocabulary_size(self) -> int:
        """How many words it knows."""
        ...

    def start(self, features: Floats, /) -> State:
        """The state that photos set.

        Args:
            features: the vectors that the encoder made of the photos, `(images, 4096)`.

        Returns:
            A state of `images` rows.
        """
        ...

    def step(
        self, tokens: Integers, parents: Integers, state: State, count: int, named: Integers, /
    ) -> tuple[Likeliest, State]:
        """Read one word in each row, and answer with the likeliest words to follow.

        Args:
            tokens: the word that each row reads, `(rows,)`.
            parents: the row of `state` that each row continues, `(rows,)`.
            state: from `start` or from the step before; it is not changed.
            count: number of likeliest words wanted, at most `vocabulary_size`.
            named: ids of the words whose log-probabilities are wanted too, `(named,)`.

        Returns:
            The words, and the state of the rows after the words that they read.
        """
        ...

    def step_all(self, tokens: Integers, parents: Integers, state: State, /) -> tuple[Floats, State]:
        """As `step`, but the answer is the log-probability of every word, `(rows, vocabulary)`."""
        ...


class Ensemble:
    """Several models that share a vocabulary; a word's probability is the mean of those that the models give it."""

    def __init__(self, models: Sequence[StepModel]) -> None:
        """Put models together.

        Raises:
            ValueError: there is no model, or their vocabularies differ in size.
        """
        if not models:
            raise ValueError("there is no model; expected one or more")
        sizes = [model.vocabulary_size for model in models]
        if len(set(sizes)) > 1:
            raise ValueError(f"the models know {' and '.join(map(str, sizes))} words; expected one shared vocabulary")
        self.vocabulary_size = sizes[0]
        self._models = tuple(models)

    def start(self, features: Floats) -> State:
        """See `StepModel`."""
        return tuple(model.start(features) for model in self._models)

    def step(
        self, tokens: Integers, parents: Integers, state: State, count: int, named: Integers
    ) -> tuple[Likeliest, State]:
        """See `StepModel`."""
        logprob, state = self.step_all(tokens, parents, state)
        return likeliest(logprob, count, named), state

    def step_all(self, tokens: Integers, parents: Integers, state: State) -> tuple[Floats, State]:
        """See `StepModel`."""
        each = [model.step_all(tokens, parents, part) for model, part in zip(self._models, state, strict=True)]
        logprobs = np.stack([logprob for logprob, _ in each])
        # Relative to the larger probability, since probabilities themselves may be too small for their type.
        top = logprobs.max(axis=0)
        top[np.isneginf(top)] = 0
        with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf
            mean: Floats = top + np.log(np.exp(logprobs - top).mean(axis=0))
        return mean, tuple(part for _, part in each)


def likeliest(logprob: Floats, count: int, named: Integers) -> Likeliest:
    """The answer of `StepModel.step` from that of `StepModel.step_all`."""
    word = largest(np.where(np.isnan(logprob), -np.inf, logprob), count)
    return Likeliest(np.take_along_axis(logprob, word, axis=1), word, logprob[:, named])


def largest(values: Floats, count: int) -> Integers:
    """The columns of the `count` largest numbers of each row, largest first; of equal numbers the first.

    Args:
        values: `(rows, columns)`, none of them NaN.
        count: fewer are given where there are fewer columns.
    """
    rows, columns = values.shape
    if columns <= max(_FEW, count):
        return np.argsort(-values, axis=1, kind="stable")[:, :count]
    least = np.partition(values, columns - count, axis=1)[:, columns - count]
    row, column = np.nonzero(values >= least[:, None])  # `count` in a row, or more where the last are equal
    column = column[np.lexsort((-values[row, column], row))]
    first = np.searchsorted(row, np.arange(rows))
    result: Integers = column[first[:, None] + np.arange(count)]
    return result

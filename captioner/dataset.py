"""Captions and features -> batches.

All captions of a split are one flat array of ids in memory; features stay on disk, mapped. The order of an epoch is a
function of the seed and the epoch's number alone, so a resumed run sees what an uninterrupted one would have seen, on
any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from captioner.annotations import Example
from captioner.vocabulary import Vocabulary

#: Captions are sorted by length within this many batches: little padding, and still a new mixture every epoch.
_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class Batch:
    """Captions with the features of their photos."""

    features: Float[Tensor, "batch 4096"]
    tokens: Int[Tensor, "batch time"]  # [start] ... [end] [pad] ...
    lengths: Int[Tensor, " batch"]  # tokens of each caption, [start] and [end] included

    @property
    def inputs(self) -> Int[Tensor, "batch time-1"]:
        """What the decoder reads: everything but the last token."""
        return self.tokens[:, :-1]

    @property
    def keep(self) -> Bool[Tensor, "batch time-1"]:
        """Positions of `inputs` that a real token follows."""
        positions = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return positions < (self.lengths - 1)[:, None]

    @property
    def targets(self) -> Int[Tensor, " words"]:
        """The tokens that follow, of the positions kept, in their order."""
        return self.tokens[:, 1:][self.keep]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.features.to(device), self.tokens.to(device), self.lengths.to(device))


class CaptionDataset:
    """The captions of a split, each with the row of its photo's features."""

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        features: npt.NDArray[np.float16],
        rows: npt.NDArray[np.int64],
        max_words: int | None = None,
    ) -> None:
        """Encode all captions.

        Args:
            examples: photos with their captions.
            vocabulary: gives the ids.
            features: `(any, 4096)`, in memory or mapped from a file.
            rows: row of `features` of each example, `(examples,)`.
            max_words: longer captions are cut there.
        """
        assert len(examples) == len(rows)
        captions = [caption for example in examples for caption in example.captions]
        ids = vocabulary.encode(captions, max_words)
        self.features = features
        self.lengths = np.array([len(caption) for caption in ids], dtype=np.int64)
        self._rows = np.repeat(rows, [len(example.captions) for example in examples])
        self._tokens = np.concatenate([np.array(caption, np.int32) for caption in ids])
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._pad = vocabulary.pad

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, captions: npt.NDArray[np.int64]) -> Batch:
        """Collate captions by number."""
        lengths = self.lengths[captions]
        positions = np.arange(lengths.max())
        real = positions < lengths[:, None]
        # (batch, time): where each token stands in the flat array; padding reads position 0 and is replaced
        where = np.where(real, self._starts[captions][:, None] + positions, 0)
        tokens = np.where(real, self._tokens[where], self._pad).astype(np.int64)
        features = self.features[self._rows[captions]].astype(np.float32)
        return Batch(torch.from_numpy(features), torch.from_numpy(tokens), torch.from_numpy(lengths))

    def epoch(self, number: int, *, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> Iterator[Batch]:
        """All captions in a new order, in batches of about equal length.

        Args:
            number: of the epoch; with the seed it decides the order.
            batch_size: captions a batch and process. The last batches of an epoch may be smaller.
            seed: of the run.
            rank: number of this process.
            processes: how many share the epoch. Each gets the same number of batches.
        """
        random = np.random.default_rng((seed, number))
        order = random.permutation(len(self))
        together = batch_size * processes * _SORTED_TOGETHER
        # A step's captions, of all processes, are neighbours in length, so that no process waits for a longer one.
        steps = [
            step
            for start in range(0, len(order), together)
            for step in _split(_by_length(order[start : start + together], self.lengths), batch_size * processes)
        ]
        for index in random.permutation(len(steps)):
            share = steps[index][rank::processes]
            # When captions do not go round, the last processes repeat one: all must take part in every step.
            yield self.batch(share if len(share) else steps[index][:1])

    def steps(self, batch_size: int, processes: int = 1) -> int:
        """Batches that `epoch` yields to each process."""
        return -(-len(self) // (batch_size * processes))


def _by_length(captions: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return captions[np.argsort(lengths[captions], kind="stable")]


def _split(captions: npt.NDArray[np.int64], size: int) -> list[npt.NDArray[np.int64]]:
    return [captions[start : start + size] for start in range(0, len(captions), size)]

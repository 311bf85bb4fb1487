"""Captions and features (or photos) -> batches.

All captions of a split are one flat array of ids in memory. Features stay on disk and are mapped into memory; photos,
which are needed where the encoder learns too, are decoded batch by batch. The seed and the number of an epoch alone
decide its order, so a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from captioner.datasets.annotations import Example
from captioner.vocabulary import Vocabulary

#: Captions are sorted by length within this many batches: that leaves little padding, and mixes them anew each epoch.
_SORTED_TOGETHER = 32


class Source(Protocol):
    """The photos of a data set by number: rows of features, or pixels that are decoded on demand (`images.Photos`)."""

    def __getitem__(self, rows: npt.NDArray[np.int64], /) -> npt.NDArray[Any]:
        """Features `(rows, 4096)`, or pixels `(rows, 3, height, width)`."""


@dataclass(frozen=True)
class Batch:
    """Captions with their photos."""

    photos: Float[Tensor, "photos 4096"] | UInt8[Tensor, "photos 3 height width"]  # features or pixels, each photo once
    rows: Int[Tensor, " photos"]  # number of each photo in the source
    photo: Int[Tensor, " batch"]  # number of each caption's photo in `photos`
    tokens: Int[Tensor, "batch time"]  # [start] ... [end] [pad] ...
    lengths: Int[Tensor, " batch"]  # tokens of each caption, [start] and [end] included

    @property
    def inputs(self) -> Int[Tensor, "batch before"]:
        """The tokens that the decoder reads: all but the last, `(batch, time - 1)`."""
        return self.tokens[:, :-1]

    @property
    def keep(self) -> Bool[Tensor, "batch before"]:
        """Whether a real token follows each position of `inputs`, `(batch, time - 1)`."""
        positions = torch.arange(self.tokens.shape[1] - 1, device=self.tokens.device)
        return positions < (self.lengths - 1)[:, None]

    @property
    def targets(self) -> Int[Tensor, " words"]:
        """The tokens to be predicted: those that follow the positions in `keep`, in their order."""
        return self.tokens[:, 1:][self.keep]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


class CaptionDataset:
    """The captions of a split, each with the row of its photo."""

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        source: Source,
        rows: npt.NDArray[np.int64],
        max_words: int | None = None,
    ) -> None:
        """Encode all captions.

        Args:
            examples: photos with their captions.
            vocabulary: gives the ids.
            source: features or pixels of the photos.
            rows: row of `source` of each example, `(examples,)`.
            max_words: longer captions are cut there.
        """
        assert len(examples) == len(rows)
        captions = [caption for example in examples for caption in example.captions]
        ids = vocabulary.encode(captions, max_words)
        self.source = source
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
        # (batch, time): position of each token in the flat array; padding reads position 0 and is replaced
        where = np.where(real, self._starts[captions][:, None] + positions, 0)
        tokens = np.where(real, self._tokens[where], self._pad).astype(np.int64)
        rows, photo = np.unique(self._rows[captions], return_inverse=True)
        photos = torch.from_numpy(self.source[rows])
        return Batch(
            photos if photos.dtype == torch.uint8 else photos.float(),
            torch.from_numpy(rows),
            torch.from_numpy(photo),
            torch.from_numpy(tokens),
            torch.from_numpy(lengths),
        )

    def epoch(
        self,
        number: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        by_photo: bool = False,
        first: int = 0,
    ) -> Iterator[Batch]:
        """All captions in a new order: in batches of about equal length, or photo by photo.

        Args:
            number: of the epoch; with the seed it decides the order.
            batch_size: captions a batch and process. The last batches of an epoch may be smaller.
            seed: of the run.
            rank: number of this process.
            processes: number of processes that share the epoch. Each gets the same number of batches.
            by_photo: keep the captions of a photo together, so that the encoder computes its features once an epoch.
                That pays when the encoder learns; when it does not, sorting by length saves more.
            first: batches to leave out at the beginning: a run that was stopped has had them.
        """
        random = np.random.default_rng((seed, number))
        size = batch_size * processes
        order = self._by_photo(random) if by_photo else self._by_length(random, size * _SORTED_TOGETHER)
        # A step's captions, of all processes, are neighbours, so that no process waits for one with longer captions.
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        for index in random.permutation(len(steps))[first:]:
            step = steps[index]
            share = np.array_split(step, processes)[rank] if by_photo else step[rank::processes]
            # Where a step has fewer captions than processes, the last processes repeat one: all take part in a step.
            yield self.batch(share if len(share) else step[:1])

    def steps(self, batch_size: int, processes: int = 1) -> int:
        """Batches that `epoch` yields to each process."""
        return -(-len(self) // (batch_size * processes))

    def _by_length(self, random: np.random.Generator, together: int) -> npt.NDArray[np.int64]:
        """Captions at random, sorted by length within each `together` of them."""
        order = random.permutation(len(self))
        parts = [order[start : start + together] for start in range(0, len(order), together)]
        return np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])

    def _by_photo(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Photos at random, the captions of each together."""
        key = random.permutation(self._rows.max() + 1)[self._rows]
        return np.argsort(key, kind="stable")

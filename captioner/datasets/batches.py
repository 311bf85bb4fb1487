"""Captions and features (or photos) -> batches.

All captions of a split are one flat array of ids in memory. Features stay on disk and are mapped into memory; photos,
which are needed where the encoder learns too, are decoded batch by batch. The seed and the number of an epoch alone
decide its order, so a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from captioner.datasets.annotations import Example
from captioner.vocabulary import Vocabulary

#: Captions are sorted by length within this many batches: that leaves little padding, and mixes them anew each epoch.
_SORTED_TOGETHER = 32


class Source(Protocol):
    """The photos of a data set by number: rows of features, or pixels that are decoded on demand."""

    def __getitem__(self, rows: npt.NDArray[np.int64], /) -> npt.NDArray[Any]:
        """Features `(rows, 4096)`, or pixels `(rows, 3, height, width)`."""


class Share(NamedTuple):
    """The captions that one process reads in one batch of an epoch."""

    epoch: int  # number of the epoch
    captions: npt.NDArray[np.int64]  # numbers of the captions
    weight: float  # of each word's loss, such that the sum over a step is the mean over the words of all processes


@dataclass(frozen=True)
class Batch:
    """Captions with their photos. Where each word lies is counted on the host, so that no device has to wait."""

    photos: Float[Tensor, "photos 4096"] | UInt8[Tensor, "photos 3 height width"] | None  # each once; None: only `rows`
    rows: Int[Tensor, " photos"]  # number of each photo in the source
    photo: Int[Tensor, " batch"]  # number of each caption's photo in `photos`
    tokens: Int[Tensor, "batch time"]  # [start] ... [end] [pad] ...
    keep: Int[Tensor, " words"]  # positions of `inputs`, row after row, that a real token follows
    targets: Int[Tensor, " words"]  # that token: the one to be predicted
    weight: float = 1.0  # see `Share`

    @classmethod
    def of(
        cls,
        photos: Tensor | None,
        rows: npt.NDArray[np.int64],
        photo: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        weight: float = 1.0,
    ) -> Batch:
        """Count the words of padded captions, whose `lengths` are their real tokens."""
        real = np.arange(tokens.shape[1] - 1) < (lengths - 1)[:, None]
        following = np.ascontiguousarray(tokens[:, 1:][real])
        as_tensor = torch.from_numpy
        return cls(
            photos, as_tensor(rows), as_tensor(photo), as_tensor(tokens), as_tensor(np.flatnonzero(real)),
            as_tensor(following), weight,
        )  # fmt: skip

    @property
    def inputs(self) -> Int[Tensor, "batch before"]:
        """The tokens that the decoder reads: all but the last, `(batch, time - 1)`."""
        return self.tokens[:, :-1]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device; from pinned memory the host does not wait for the copy."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can copy by itself."""
        return self._with(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            values[name] = change(value) if isinstance(value, Tensor) else value
        return Batch(**values)


class CaptionDataset:
    """The captions of a split, each with the row of its photo."""

    def __init__(self, ids: Sequence[Sequence[int]], rows: npt.NDArray[np.int64], pad: int) -> None:
        """Lay out captions that are encoded.

        Args:
            ids: `[start]` ... `[end]` of each caption.
            rows: row of each caption's photo in its source, `(captions,)`.
            pad: id of `[pad]`.
        """
        self.lengths = np.array([len(caption) for caption in ids], dtype=np.int64)
        self._rows, self._pad = rows, pad
        self._tokens = np.concatenate([np.array(caption, np.int32) for caption in ids])
        self._starts = np.cumsum(self.lengths) - self.lengths

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        rows: npt.NDArray[np.int64],
        max_words: int | None = None,
    ) -> CaptionDataset:
        """Encode all captions of some photos.

        Args:
            examples: photos with their captions.
            vocabulary: gives the ids.
            rows: row of each example's photo in its source, `(examples,)`.
            max_words: longer captions are cut there.
        """
        assert len(examples) == len(rows)
        ids = vocabulary.encode([caption for example in examples for caption in example.captions], max_words)
        return cls(ids, np.repeat(rows, [len(example.captions) for example in examples]), vocabulary.pad)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, share: Share) -> Batch:
        """Collate captions; their photos are named by row alone."""
        captions = share.captions
        lengths = self.lengths[captions]
        positions = np.arange(lengths.max())
        real = positions < lengths[:, None]
        # (batch, time): position of each token in the flat array; padding reads position 0 and is replaced
        where = np.where(real, self._starts[captions][:, None] + positions, 0)
        tokens = np.where(real, self._tokens[where], self._pad).astype(np.int64)
        rows, photo = np.unique(self._rows[captions], return_inverse=True)
        return Batch.of(None, rows, photo, tokens, lengths, share.weight)

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
        accumulate: int = 1,
    ) -> list[Share]:
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
            accumulate: batches a step; the words of all of them share the weight.
        """
        random = np.random.default_rng((seed, number))
        size = batch_size * processes
        order = self._by_photo(random) if by_photo else self._by_length(random, size * _SORTED_TOGETHER)
        # A batch's captions, of all processes, are neighbours, so that no process waits for one with longer captions.
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        batches = [batches[index] for index in random.permutation(len(batches))]
        words = np.array([(self.lengths[batch] - 1).sum() for batch in batches])
        steps = np.add.reduceat(words, np.arange(0, len(batches), accumulate))
        shares = []
        for index in range(first, len(batches)):
            batch = batches[index]
            share = np.array_split(batch, processes)[rank] if by_photo else batch[rank::processes]
            # Gradients of processes are averaged, hence times their number.
            weight = processes / float(steps[index // accumulate])
            # Where a batch has fewer captions than processes, the last processes repeat one, which counts nothing.
            shares.append(Share(number, share, weight) if len(share) else Share(number, batch[:1], 0.0))
        return shares

    def batches(self, batch_size: int, processes: int = 1) -> int:
        """Batches that `epoch` gives each process."""
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

"""Batches on the device before they are needed: decoded by worker processes, pinned, copied on another stream."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.datasets.batches import Batch, CaptionDataset, Share, Source
from captioner.datasets.photos import Photos
from captioner.errors import CaptionerError

_AHEAD = 4  # batches that each worker process prepares before they are asked for
_RESIDENT = 0.5  # share of a GPU's free memory that features may take
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
_ROWS = 8192  # features that are copied to a GPU together


class Loader:
    """Gives the batches of an epoch; the host never waits for the device, nor the device for a photo."""

    def __init__(
        self,
        captions: CaptionDataset,
        source: Source,
        device: torch.device,
        workers: int = 1,
        beside: Loader | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            captions: of a split.
            source: features or photos. Features move to a GPU as a whole, where it has room for them.
            device: where batches are wanted.
            workers: processes that decode photos; features need none.
            beside: another loader of the same source, whose features on the GPU serve this one too.
        """
        self._device = device
        self._table: Tensor | None = _resident(source, device) if beside is None else beside._table
        self._plan: list[Share] = []
        workers = workers if isinstance(source, Photos) else 0
        self._batches = DataLoader(
            _Collated(captions, None if self._table is not None else source),
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            prefetch_factor=_AHEAD if workers else None,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_follow,
        )

    def __call__(self, shares: Sequence[Share]) -> Iterator[Batch]:
        """The batches of some shares, on the device.

        Raises:
            CaptionerError: a photo cannot be read any more.
        """
        self._plan[:] = shares
        for batch in _ahead(self._read(), self._device):
            photos = batch.photos if self._table is None else self._table.index_select(0, batch.rows)
            assert photos is not None
            yield replace(batch, photos=photos if photos.dtype == torch.uint8 else photos.float())

    def _read(self) -> Iterator[Batch]:
        for batch in self._batches:
            if isinstance(batch, CaptionerError):
                raise batch
            yield batch


class _Collated(Dataset[Batch | CaptionerError]):
    """Batches by share, with their photos; an error is a value here, since what a worker raises loses its words."""

    def __init__(self, captions: CaptionDataset, source: Source | None) -> None:
        self._captions, self._source = captions, source

    def __getitem__(self, share: Share) -> Batch | CaptionerError:
        batch = self._captions.batch(share)
        if self._source is None:
            return batch
        rows = batch.rows.numpy()
        try:
            numbers = (
                self._source.changed(rows, share.epoch) if isinstance(self._source, Photos) else self._source[rows]
            )
        except CaptionerError as error:
            return error
        return replace(batch, photos=torch.from_numpy(numbers))


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch while the device works on the one before."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    current = None
    for batch in batches:
        with torch.cuda.stream(copying):
            following = batch.to(device)
        if current is not None:
            yield current
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for tensor in following.tensors():  # its memory is not given away while the computing stream may read it
            tensor.record_stream(computing)
        current = following
    if current is not None:
        yield current


def _resident(source: Source, device: torch.device) -> Tensor | None:
    """All features on a GPU, if it has room for them."""
    if device.type != "cuda" or not isinstance(source, np.ndarray):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if source.nbytes > _RESIDENT * free:
        return None
    table = torch.empty(source.shape, dtype=torch.float16, device=device)
    for start in range(0, len(source), _ROWS):
        table[start : start + _ROWS] = torch.from_numpy(np.array(source[start : start + _ROWS])).to(device)
    return table


def _follow(_: int) -> None:
    """Leave Ctrl-C to the process that trains, which saves first, and end when that process ends, even if it is killed.

    A worker shares the lock on the folder of the run, so the run could not be started again while a worker lives.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

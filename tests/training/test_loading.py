"""Batches come with their features or photos, in order, from worker processes too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.datasets.batches import CaptionDataset
from captioner.datasets.photos import Augmentation, Photos
from captioner.errors import CaptionerError
from captioner.training.loading import Loader

CPU = torch.device("cpu")
START, END, PAD = 1, 2, 0


def dataset(photos: int = 9) -> CaptionDataset:
    """Caption n is of photo n // 2."""
    ids = [[START, *[3 + n] * (1 + n % 3), END] for n in range(2 * photos)]
    return CaptionDataset(ids, np.arange(photos).repeat(2), PAD)


@pytest.fixture
def album(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{n}.png" for n in range(9)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (10 * n, 0, 0)).save(path)
    return paths


def test_features_come_with_their_captions(tmp_path: Path) -> None:
    numbers = np.repeat(np.arange(9, dtype=np.float16)[:, None], 4096, axis=1)
    numbers.tofile(tmp_path / "features.f16")
    mapped = np.memmap(tmp_path / "features.f16", np.float16, mode="r", shape=(9, 4096))
    shares = dataset().epoch(0, batch_size=4, seed=0)
    for source in (numbers, mapped):
        for batch in Loader(dataset(), source, CPU)(shares):
            assert batch.photos is not None
            assert batch.photos.dtype == torch.float32
            assert batch.photos[batch.photo, 0].tolist() == [(ids[1] - 3) // 2 for ids in batch.tokens.tolist()]
            batch.photos.add_(1)  # a copy: the file stays as it is
    assert np.array_equal(mapped, numbers)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_photos_come_with_their_captions(album: list[Path], workers: int) -> None:
    load = Loader(dataset(), Photos(album, 8), CPU, workers)
    for epoch in range(2):
        shares = dataset().epoch(epoch, batch_size=4, seed=0, by_photo=True)
        batches = list(load(shares))
        assert len(batches) == len(shares) == 5
        for batch, share in zip(batches, shares, strict=True):
            assert batch.photos is not None
            assert batch.photos.dtype == torch.uint8
            assert batch.photos.shape[1:] == (3, 8, 8)
            assert (batch.photos[batch.photo, 0, 0, 0] // 10).tolist() == (share.captions // 2).tolist()
            assert batch.weight == share.weight


def test_workers_change_nothing(album: list[Path]) -> None:
    shares = dataset().epoch(3, batch_size=4, seed=0, by_photo=True)

    def pixels(workers: int) -> list[Any]:
        photos = Photos(album, 8, Augmentation(mirror=True, crop=0.5, colour=0.2), seed=5)
        return [batch.photos for batch in Loader(dataset(), photos, CPU, workers)(shares)]

    assert all(torch.equal(one, other) for one, other in zip(pixels(0), pixels(2), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_has_gone_is_one_line(album: list[Path], workers: int) -> None:
    album[4].unlink()
    load = Loader(dataset(), Photos(album, 8), CPU, workers)
    with pytest.raises(CaptionerError, match=r"4\.png: no such file") as caught:
        list(load(dataset().epoch(0, batch_size=4, seed=0, by_photo=True)))
    assert "\n" not in str(caught.value)

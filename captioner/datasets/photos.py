"""Photos that are decoded when they are asked for, as they are or changed anew in every epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from captioner import images
from captioner.errors import ImageError

_ASPECT = 0.2  # natural logarithm of the largest ratio by which a part's sides differ from the photo's
_TOGETHER = 64  # photos that are decoded between two looks


@dataclass(frozen=True)
class Augmentation:
    """How photos are changed while the CNN learns, so that it never sees quite the same photo twice."""

    mirror: bool = False  # half of the photos
    crop: float = 1.0  # smallest share of a photo's area that is shown; 1 shows all of it
    colour: float = 0.0  # largest change of brightness, contrast and saturation, as a share

    def __call__(self, path: Path, size: int, random: np.random.Generator) -> images.Pixels:
        """Decode a photo, and change it.

        Args:
            path: the file.
            size: height and width of the result, in pixels.
            random: decides the change.

        Returns:
            RGB, 0 to 255, `(3, size, size)`.

        Raises:
            ImageError: the photo cannot be decoded.
        """
        # Large enough that the smallest part still has as many pixels as are wanted.
        pixels = images.load(path, math.ceil(size / math.sqrt(self.crop)))
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        share, aspect = random.uniform(self.crop, 1), math.exp(random.uniform(-_ASPECT, _ASPECT))
        corner, mirrored, changes = random.random(2), random.random() < 0.5, random.uniform(-1, 1, 3)
        if self.crop < 1:
            width, height = (
                min(image.width, round(image.width * math.sqrt(share * by))) for by in (aspect, 1 / aspect)
            )
            left, top = corner * (image.width - width + 1, image.height - height + 1) // 1
            image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        for enhance, change in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), changes, strict=True
        ):
            if self.colour:
                image = enhance(image).enhance(1 + self.colour * change)
        result = np.asarray(image).transpose(2, 0, 1)
        return np.ascontiguousarray(result[:, :, ::-1] if self.mirror and mirrored else result)


class Photos:
    """Photos by number, `(photos, 3, size, size)`."""

    def __init__(
        self, paths: Sequence[Path], size: int, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        """Name the photos.

        Args:
            paths: the files.
            size: see `images.load`.
            augmentation: how `changed` changes them; None leaves them as they are.
            seed: decides the changes, with the number of a photo and of the epoch.
        """
        self.paths, self.size = paths, size
        self._augmentation = None if augmentation == Augmentation() else augmentation
        self._seed = seed

    def check(self, rows: npt.NDArray[np.int64]) -> dict[int, ImageError]:
        """Decode some photos once, and name those that cannot be decoded, by number."""
        failures: dict[int, ImageError] = {}
        for batch in images.stream([self.paths[row] for row in rows], self.size, _TOGETHER):
            failures |= {int(rows[index]): error for index, error in batch.failures.items()}
        return failures

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> images.Pixels:
        """Decode photos in several threads, as they are: RGB, 0 to 255, `(rows, 3, size, size)`.

        Raises:
            ImageError: one of them cannot be decoded.
        """
        (batch,) = images.stream([self.paths[row] for row in rows], self.size, len(rows))
        for error in batch.failures.values():
            raise error
        return batch.pixels

    def changed(self, rows: npt.NDArray[np.int64], epoch: int) -> images.Pixels:
        """Decode photos in this thread, and change them as an epoch shows them; for a worker process.

        Raises:
            ImageError: one of them cannot be decoded.
        """
        return np.stack([self._one(int(row), epoch) for row in rows])

    def _one(self, row: int, epoch: int) -> images.Pixels:
        if self._augmentation is None:
            return images.load(self.paths[row], self.size)
        return self._augmentation(self.paths[row], self.size, np.random.default_rng((self._seed, epoch, row)))

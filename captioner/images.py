"""File -> tensor: the only preprocessing in the project.

The whole photo is squeezed onto a square, so nothing at its edges is lost. A CNN trained on ImageNet saw aspect ratios
from 3:4 to 4:3 (Inception-style crops), which covers the distortion of ordinary photos. Normalisation belongs to the
encoder; here values stay 8-bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captioner.errors import ImageError

log = logging.getLogger(__name__)

#: Names what `load` does to a photo. It is part of every feature stamp: change it when the result changes.
PREPROCESSING = "whole photo, RGB, bilinear with antialiasing, v1"

#: Endings that are taken for photos when a folder is searched.
EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

#: Endings of photos that cannot be read everywhere; those in a folder are counted and left out.
_OTHER_PHOTOS = frozenset({".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg"})

#: Transparent parts are shown on this colour, as a web page would show them.
_BACKGROUND = (255, 255, 255)


def find(paths: Iterable[Path]) -> list[Path]:
    """List photos: files as they are given, folders searched through all their levels in the order of their names.

    Hidden files in folders are passed over: macOS leaves one, `._photo.jpg`, beside each photo on a foreign disk.

    Raises:
        ImageError: a path does not exist or may not be looked at, or a folder holds no photo.
    """
    found: list[Path] = []
    for path in paths:
        try:
            found += _photos_in(path) if path.is_dir() else [path]
            there = path.exists()
        except OSError as error:
            place = str(error.filename or path)
            raise ImageError(
                f"{place}: cannot be looked at ({error.strerror}); give a photo or a folder of photos that may be read"
            ) from None
        if not there and re.match(r"https?:/", str(path)):
            raise ImageError(f"{path}: is an address; fetch the photo first, and give the path of its file")
        if not there:
            raise ImageError(f"{path}: no such file or folder; give the path of a photo or of a folder of photos")
    return found


def _photos_in(folder: Path) -> list[Path]:
    shown = [path for path in folder.rglob("*") if not path.name.startswith(".")]
    inside = sorted(path for path in shown if path.suffix.lower() in EXTENSIONS and path.is_file())
    if other := sorted(path for path in shown if path.suffix.lower() in _OTHER_PHOTOS):
        log.warning("in other formats, and left out: %d, e.g. %s; convert them to JPEG", len(other), other[0])
    if not inside:
        raise ImageError(f"{folder}: no photo in this folder; expected files ending in {', '.join(sorted(EXTENSIONS))}")
    return inside


def load(source: Path | str | Image.Image, size: int) -> UInt8[Tensor, "3 height width"]:
    """Decode a photo and resize it.

    Understands every format that Pillow reads, the first frame of an animation, greyscale, palette, transparency, CMYK
    and 16 bits a channel, and turns the photo as its EXIF orientation says.

    Args:
        source: a file, or an image that is already in memory.
        size: height and width of the result, in pixels.

    Returns:
        RGB, channels first, 0 to 255, `(3, size, size)`.

    Raises:
        ImageError: the file is missing, not a photo, damaged or too large to decode safely.
    """
    path = "image in memory" if isinstance(source, Image.Image) else Path(source)
    try:
        if isinstance(source, Image.Image):
            return _to_tensor(source, size)
        with Path(source).open("rb") as file, _open(file, str(path)) as image:
            if image.width * image.height > _most_pixels():
                raise Image.DecompressionBombError
            # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, never below what is asked for.
            image.draft("RGB", (size, size))
            return _to_tensor(image, size)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file; give the path of a photo") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: is a folder; give the path of a photo") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not a photo; expected JPEG, PNG, WebP, GIF, BMP or TIFF") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = _most_pixels() // 1_000_000
        raise ImageError(f"{path}: has more than {limit:.0f} million pixels; make it smaller first") from None
    except PermissionError:
        raise ImageError(f"{path}: may not be read; change its permissions") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged files; the first line of their message is the useful one.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageError(f"{path}: cannot be decoded ({reason}); the file is damaged or of an unknown kind") from None


class Photos:
    """Photos that are decoded when they are asked for, `(photos, 3, size, size)`; few enough are kept in memory."""

    _KEPT_BYTES = 2 << 30  # pixels of all photos together, up to which they are decoded once and kept

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        """Name the photos.

        Args:
            paths: the files.
            size: see `load`.
        """
        self.paths, self.size = paths, size
        keep = len(paths) * 3 * size * size <= self._KEPT_BYTES
        self._kept: dict[int, Tensor] | None = {} if keep else None

    def check(self) -> dict[int, ImageError]:
        """Decode every photo once, and name those that cannot be decoded, by number."""
        failures: dict[int, ImageError] = {}
        for batch in stream(self.paths, self.size, batch_size=64):
            failures |= batch.failures
            if self._kept is not None:
                self._kept |= dict(zip(batch.indices, batch.pixels, strict=True))
        return failures

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pixels of photos by number, RGB, 0 to 255, `(rows, 3, size, size)`.

        Raises:
            ImageError: one of them cannot be decoded.
        """
        wanted = [int(row) for row in rows]
        kept = {} if self._kept is None else self._kept
        missing = [row for row in wanted if row not in kept]
        decoded: dict[int, Tensor] = {}
        for batch in stream([self.paths[row] for row in missing], self.size, batch_size=len(missing) or 1):
            for error in batch.failures.values():
                raise error
            decoded = {missing[index]: pixels for index, pixels in zip(batch.indices, batch.pixels, strict=True)}
        if self._kept is not None:
            self._kept |= decoded
        return torch.stack([kept[row] if row in kept else decoded[row] for row in wanted]).numpy()


@dataclass(frozen=True)
class PhotoBatch:
    """Photos that were decoded together."""

    indices: list[int]  # which of the paths these are
    pixels: UInt8[Tensor, "batch 3 height width"]  # RGB, 0 to 255
    failures: dict[int, ImageError]  # paths that could not be decoded, by index


def stream(paths: Sequence[Path], size: int, batch_size: int) -> Iterator[PhotoBatch]:
    """Decode photos in the background, a few batches ahead, in their order and in constant memory.

    Threads are enough: Pillow releases the interpreter lock while it decodes and resizes.

    Args:
        paths: the photos.
        size: see `load`.
        batch_size: paths a batch; photos that cannot be decoded are reported in the batch's `failures`.
    """
    starts = range(0, len(paths), batch_size)
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    ahead: deque[tuple[int, list[Future[Tensor]]]] = deque()
    try:
        for start in starts:
            ahead.append((start, [pool.submit(load, path, size) for path in paths[start : start + batch_size]]))
            if len(ahead) > 2:
                yield _collect(*ahead.popleft(), size)
        while ahead:
            yield _collect(*ahead.popleft(), size)
    finally:
        pool.shutdown(cancel_futures=True)  # a caller who stops early does not wait for photos that nobody will see


def _collect(start: int, photos: list[Future[Tensor]], size: int) -> PhotoBatch:
    indices, pixels, failures = [], [], {}
    for index, photo in enumerate(photos, start):
        try:
            pixels.append(photo.result())
            indices.append(index)
        except ImageError as error:
            failures[index] = error
    stacked = torch.stack(pixels) if pixels else torch.empty((0, 3, size, size), dtype=torch.uint8)
    return PhotoBatch(indices, stacked, failures)


def _most_pixels() -> float:
    """Where Pillow's own error is: 179 million pixels. Phones make photos of 108 million."""
    return 2 * (Image.MAX_IMAGE_PIXELS or math.inf)


def _open(file: IO[bytes], name: str) -> Image.Image:
    """Do what `Image.open` does but for its warning of more than half of `_most_pixels`.

    That warning could be silenced for all threads at once only, of which `stream` has many and the caller others.
    """
    prefix = file.read(16)
    for register in (Image.preinit, Image.init):  # the usual formats, then all
        register()
        for factory, accept in list(Image.OPEN.values()):  # other threads may add some
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
                accepted = accept is None or accept(prefix)
                if accepted and not isinstance(accepted, str):  # a text says why Pillow was built without the format
                    file.seek(0)
                    return factory(file, name)
    raise UnidentifiedImageError


def _to_tensor(image: Image.Image, size: int) -> UInt8[Tensor, "3 height width"]:
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    # (H, W, 3) -> (3, H, W)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(np.asarray(image))
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        canvas = Image.new("RGBA", layers.size, (*_BACKGROUND, 255))
        return Image.alpha_composite(canvas, layers).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(values: np.ndarray) -> Image.Image:
    """16-bit integers (0 to 65,535) and floats (0 to 1, or 0 to 255): Pillow would clip them at 255 instead."""
    grey = np.nan_to_num(values.astype(np.float32))
    if np.issubdtype(values.dtype, np.integer):
        grey /= 257.0  # 65,535 -> 255
    elif grey.max() <= 1.0:
        grey *= 255.0
    grey = grey.clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")

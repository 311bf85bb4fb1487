"""Photo -> array: the only preprocessing in the project.

The whole photo is squeezed onto a square, so nothing at its edges is lost. A CNN trained on ImageNet saw aspect ratios
from 3:4 to 4:3 (Inception-style crops), which covers the distortion of ordinary photos. Normalisation belongs to the
encoder; here values stay 8-bit.
"""

from __future__ import annotations

import ctypes
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError, _imaging

from captioner.errors import ImageError
from captioner.machine import processors

log = logging.getLogger(__name__)

#: Pixels of a photo, RGB, channels first, 0 to 255: `(3, size, size)`, or `(photos, 3, size, size)`.
Pixels = npt.NDArray[np.uint8]

#: Photos as `load` takes them.
Source = str | Path | bytes | IO[bytes] | Image.Image | npt.NDArray[np.uint8]

_T = TypeVar("_T")

#: Names what `load` does to a photo. It is part of every feature stamp: change it when the result changes.
PREPROCESSING = "whole photo, RGB, bilinear with antialiasing, v1"

#: Endings that are taken for photos when a folder is searched.
EXTENSIONS = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split())

#: Endings of photos that cannot be read; those in a folder are counted and left out.
_OTHER_PHOTOS = frozenset({".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".svg"})

#: The formats that are opened. Pillow knows others, of which some start programs (EPS starts Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

#: What `load` accepts, for messages.
_KINDS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or HEIC"

#: Transparent parts are shown on this colour, as a web page would show them.
_BACKGROUND = (255, 255, 255)

#: Photos of more pixels are refused. Phones make photos of 200 million (decoded at a fraction of that, if JPEG).
_MOST_PIXELS = 2 * 89_478_485  # where Pillow itself stops

#: Pixels that all threads together decode at once; a larger photo is decoded alone.
_PIXELS_AT_ONCE = 1 << 27

#: Photos of fewer pixels are decoded without waiting for others.
_FEW_PIXELS = 1 << 22

#: The share of a JPEG's rows that may be lacking at its end.
_MOST_LACKING = 0.25


def _quieten() -> None:
    """Keep what decoders say about damaged files off the terminal: `load` says it in one line of its own.

    Python's filters of warnings belong to the whole process, so that one filter, for Pillow's own modules, is set once.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with suppress(AttributeError, OSError):  # libtiff is linked into Pillow where the names cannot be reached
        libtiff = ctypes.CDLL(_imaging.__file__)
        libtiff.TIFFSetErrorHandler(None)
        libtiff.TIFFSetWarningHandler(None)


_quieten()


def load(source: Source, size: int, *, name: str | None = None) -> Pixels:
    """Decode a photo and resize it.

    Reads JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and, with pillow-heif, HEIC; the first frame of an animation; greyscale,
    palettes, transparency, CMYK and 16 bits a channel. The photo is turned as its EXIF orientation says.

    Args:
        source: a file's path or content, a binary file object, a PIL image, or an array `(height, width, 3)` of uint8.
        size: height and width of the result, in pixels.
        name: of the photo in messages; by default its path, if it has one.

    Returns:
        RGB, channels first, 0 to 255, `(3, size, size)`.

    Raises:
        ImageError: the file is missing, not a photo, damaged or too large to decode safely, or the source is of
            another kind.
    """
    name = name or (str(source) if isinstance(source, str | Path) else "image in memory")
    try:
        if isinstance(source, str | Path):
            with open_file(source) as file:
                return _decode(file, name, size, _to_array)
        if isinstance(source, bytes | bytearray | memoryview):
            return _decode(io.BytesIO(source), name, size, _to_array)
        if isinstance(source, Image.Image):
            return _to_array(source, size)
        if isinstance(source, np.ndarray):
            return _to_array(_from_array(source), size)
        return _decode(_binary(source), name, size, _to_array)
    except ImageError:
        raise
    except Exception as error:
        raise _explained(error, name) from None


def thumbnail(path: str | Path, side: int) -> Image.Image:
    """A small upright picture of a photo, in its proportions and RGB; the longer side has `side` pixels at most.

    Raises:
        ImageError: see `load`.
    """

    def small(image: Image.Image, side: int) -> Image.Image:
        rgb = _to_rgb(_upright(image)).copy()
        rgb.thumbnail((side, side))
        return rgb

    try:
        with open_file(path) as file:
            return _decode(file, str(path), side, small)
    except ImageError:
        raise
    except Exception as error:
        raise _explained(error, str(path)) from None


def _explained(error: Exception, name: str) -> ImageError:
    """An error of the file system or of a decoder in one line."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ImageError(f"{name}: no such file; give the path of a photo", "missing")
    if isinstance(error, IsADirectoryError):
        return ImageError(f"{name}: is a folder; give the path of a photo", "special")
    if isinstance(error, PermissionError):
        return ImageError(f"{name}: may not be read; change its permissions")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large(name)
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: needs more memory than there is; make the photo smaller first", "too large")
    # Pillow's decoders raise nearly anything on damaged files; the first line of their message is the useful one.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ImageError(f"{name}: cannot be decoded ({reason}); the file is damaged or of an unknown kind", "damaged")


def walk(
    folder: str, *, recursive: bool = True, hidden: bool = False, other: list[str] | None = None
) -> Iterator[tuple[str, ImageError | None]]:
    """List the photos in a folder, in the order of their names, and the places that cannot be looked at.

    Links are followed. A folder is searched once, however many links lead to it, so that loops end. The memory in use
    grows with the largest folder and with the number of folders, not with the number of photos.

    Args:
        folder: where to look.
        recursive: whether folders inside it are searched too.
        hidden: whether to list names that begin with a dot; macOS leaves `._photo.jpg` beside each photo on a foreign
            disk.
        other: list to which photos in formats that cannot be read are added.

    Yields:
        The path of a photo; or the path of a folder that may not be read or a link that leads nowhere, and the error.
    """
    searched: set[tuple[int, int]] = set()  # folders, by device and number
    levels: list[Iterator[os.DirEntry[str]]] = []
    enter: str | None = folder
    while enter or levels:
        if enter:
            try:
                levels.append(iter(_entries(enter, searched)))
            except OSError as error:
                remedy = "change its permissions, or leave it out"
                yield enter, ImageError(f"{enter}: cannot be searched for photos ({error.strerror}); {remedy}")
            enter = None
            continue
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            continue
        if entry.name.startswith(".") and not hidden:
            continue
        dot = entry.name.rfind(".")
        ending = entry.name[dot:].lower() if dot > 0 else ""
        if entry.is_symlink() and (reason := _why_lost(entry)):
            if ending in EXTENSIONS or not ending:  # without an ending, it may have led to a folder of photos
                said = f"{entry.path}: is a link that leads nowhere ({reason}); mend or delete it"
                yield entry.path, ImageError(said, "missing")
        elif _is_folder(entry):
            enter = entry.path if recursive else None
        elif ending in EXTENSIONS:
            yield entry.path, None
        elif other is not None and ending in _OTHER_PHOTOS:
            other.append(entry.path)


def _entries(folder: str, searched: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name; none if it was searched before."""
    status = Path(folder).stat()
    if (status.st_dev, status.st_ino) in searched:
        return []
    searched.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        return sorted(found, key=lambda entry: entry.name)


def _why_lost(link: os.DirEntry[str]) -> str | None:
    try:
        link.stat()
        return None
    except OSError as error:
        return error.strerror


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # `load` says why
        return False


def find(paths: Iterable[Path]) -> list[Path]:
    """List photos: files as they are given, folders searched through all their levels in the order of their names.

    Places in a folder that cannot be looked at are logged; see `walk`.

    Raises:
        ImageError: a path does not exist or may not be looked at, or a folder holds no photo.
    """
    found: list[Path] = []
    for path in paths:
        if not is_folder(path):
            found.append(path)
            continue
        before, other = len(found), list[str]()
        for photo, error in walk(str(path), other=other):
            if error is None:
                found.append(Path(photo))
            else:
                log.warning("%s", error)
        say_left_out(other)
        if len(found) == before:
            raise no_photo(path)
    return found


def say_left_out(other: Sequence[str]) -> None:
    """Log the photos in formats that cannot be read; see `walk`."""
    if other:
        log.warning("in other formats, and left out: %d, e.g. %s; convert them to JPEG", len(other), other[0])


def is_folder(path: Path) -> bool:
    """Whether a path that a user gave is a folder rather than a photo.

    Raises:
        ImageError: it does not exist or may not be looked at.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if re.match(r"https?:/", str(path)):
            raise ImageError(f"{path}: is an address; fetch the photo first, and give the path of its file") from None
        raise ImageError(f"{path}: no such file or folder; give the path of a photo or of a folder of photos") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{path}: cannot be looked at ({reason}); give a photo or a folder of photos that may be read"
        ) from None


def no_photo(folder: str | Path) -> ImageError:
    """The error of a folder that holds no photo."""
    endings = ", ".join(sorted(EXTENSIONS))
    return ImageError(f"{folder}: no photo in this folder; expected files ending in {endings}")


def read(path: str | Path) -> bytes:
    """The content of a photo's file.

    Raises:
        ImageError: it is missing, may not be read, or is no plain file.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except ImageError:
        raise
    except Exception as error:
        raise _explained(error, str(path)) from None


def ending(content: bytes) -> str:
    """The usual ending of the name of a photo's file, as ".jpg", by its content.

    Raises:
        ImageError: it is no photo.
    """
    with _open(io.BytesIO(content), "image in memory") as image:
        kind = (image.format or "").lower()
    return {"jpeg": ".jpg", "mpo": ".jpg", "heif": ".heic"}.get(kind, f".{kind}")


@dataclass(frozen=True)
class PhotoBatch:
    """Photos that were decoded together."""

    indices: list[int]  # which of the paths these are
    pixels: Pixels  # RGB, 0 to 255, `(photos, 3, size, size)`
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
    pool = ThreadPoolExecutor(processors())
    ahead: deque[tuple[int, list[Future[Pixels]]]] = deque()
    try:
        for start in starts:
            ahead.append((start, [pool.submit(load, path, size) for path in paths[start : start + batch_size]]))
            if len(ahead) > 2:
                yield _collect(*ahead.popleft(), size)
        while ahead:
            yield _collect(*ahead.popleft(), size)
    finally:
        pool.shutdown(cancel_futures=True)  # a caller who stops early does not wait for photos that nobody will see


def _collect(start: int, photos: list[Future[Pixels]], size: int) -> PhotoBatch:
    indices, pixels, failures = [], [], {}
    for index, photo in enumerate(photos, start):
        try:
            pixels.append(photo.result())
            indices.append(index)
        except ImageError as error:
            failures[index] = error
    stacked = np.stack(pixels) if pixels else np.empty((0, 3, size, size), np.uint8)
    return PhotoBatch(indices, stacked, failures)


# One photo


def open_file(path: str | Path) -> IO[bytes]:
    """Open a regular file; a pipe or a device is refused at once, where reading it could wait for ever."""
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ImageError(f"{path}: is a pipe or a device; give the path of a photo", "special")
    return file


def _binary(source: Any) -> IO[bytes]:
    """Check that a source is a binary file object."""
    if not hasattr(source, "read"):
        raise _unaccepted(type(source).__name__)
    if not isinstance(source.read(0), bytes):
        raise ImageError("image in memory: is a file object of text; open the photo with open(path, 'rb')")
    return source  # type: ignore[no-any-return]


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise _unaccepted(f"array of {array.dtype} and shape {array.shape}")
    if 0 in array.shape:
        raise ImageError("image in memory: has no pixels; give one that has", "damaged")
    return Image.fromarray(array)


def _unaccepted(kind: str) -> ImageError:
    return ImageError(
        f"image in memory: is of a kind that cannot be read ({kind}); give a path, bytes, a binary file object, "
        "a PIL image, or an array (height, width, 3) of uint8"
    )


def _too_large(name: str) -> ImageError:
    return ImageError(
        f"{name}: has more than {_MOST_PIXELS // 1_000_000} million pixels; make it smaller first", "too large"
    )


def _decode(file: IO[bytes], name: str, size: int, finish: Callable[[Image.Image, int], _T]) -> _T:
    with _open(file, name) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise _too_large(name)
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size, never below what is asked for. A progressive one
        # takes the memory of its whole size all the same.
        whole = image.width * image.height
        image.draft("RGB", (size, size))
        with _room(whole if image.info.get("progressive") else image.width * image.height):
            try:
                image.load()
            except OSError:
                if image.format not in ("JPEG", "MPO"):
                    raise
                image = _without_end(file, name, size)
            try:
                return finish(image, size)
            finally:
                image.close()  # before the next photo has its room


def _open(file: IO[bytes], name: str) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        brand = file.read(12)[4:]
    if re.match(rb"ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", brand):
        return _open_heic(file, name)
    if brand.startswith((b"ftypavif", b"ftypavis")):
        raise ImageError(f"{name}: is AVIF, which this Pillow cannot read; pip install --upgrade pillow", "unsupported")
    raise ImageError(f"{name}: not a photo; expected {_KINDS}", "not a photo")


def _open_heic(file: IO[bytes], name: str) -> Image.Image:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImageError(f"{name}: is HEIC; to read it, pip install 'captioner[heic]'", "unsupported") from None
    register_heif_opener()
    file.seek(0)
    return Image.open(file, formats=("HEIF",))


def _without_end(file: IO[bytes], name: str, size: int) -> Image.Image:
    """Decode a JPEG that breaks off: the decoder is given the mark of the end, and leaves grey what it has not seen.

    Raises:
        OSError: too much is lacking, or it does not break off but is damaged.
    """
    file.seek(0)
    image = Image.open(io.BytesIO(file.read() + b"\xff\xd9"), formats=("JPEG",))
    image.draft("RGB", (size, size))
    image.load()
    rows = np.asarray(image.convert("RGB")).reshape(image.height, -1)
    seen = np.flatnonzero((rows != 128).any(axis=1))
    lacking = 1 - (seen[-1] + 1 if len(seen) else 0) / image.height
    if lacking > _MOST_LACKING:
        raise OSError(f"image file is truncated, {lacking:.0%} is lacking")
    log.warning("%s: lacks its last bytes, and is captioned without them", name)
    return image


class _Room:
    """Pixels that are being decoded, by all threads."""

    def __init__(self) -> None:
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        """Wait until a photo of so many pixels has room; one larger than all the room is decoded alone."""
        if pixels <= _FEW_PIXELS:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= _PIXELS_AT_ONCE)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_room = _Room()


def _to_array(image: Image.Image, size: int) -> Pixels:
    if 0 in image.size:
        raise ImageError("image in memory: has no pixels; give one that has", "damaged")
    if image.tell():
        image.seek(0)
    rgb = _to_rgb(_upright(image), size)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    # (height, width, 3) -> (3, height, width)
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photo as its EXIF orientation says; EXIF that cannot be read says nothing."""
    try:
        turned = image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image, width: int | None = None) -> Image.Image:
    """A photo in RGB; one that is transparent may come as narrow as it is going to be."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(np.asarray(image))
    if image.has_transparency_data:
        return _on_background(image, width)
    return image.convert("RGB")


def _on_background(image: Image.Image, width: int | None) -> Image.Image:
    """Lay a transparent photo on the background, a band of rows at a time: whole, it would be in memory four times.

    A band is narrowed at once, for resizing treats rows and columns one after the other; it may differ by rounding.
    """
    rows = max(1, _FEW_PIXELS // image.width)
    width = image.width if width is None or rows >= image.height else width
    rgb = Image.new("RGB", (width, image.height))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        canvas = Image.new("RGBA", band.size, (*_BACKGROUND, 255))
        opaque = Image.alpha_composite(canvas, band).convert("RGB")
        rgb.paste(opaque.resize((width, band.height), Image.Resampling.BILINEAR), (0, top))
    return rgb


def _from_deep_grey(values: npt.NDArray[Any]) -> Image.Image:
    """16-bit integers (0 to 65,535) and floats (0 to 1, or 0 to 255): Pillow would clip them at 255 instead."""
    grey = np.nan_to_num(values.astype(np.float32))
    if np.issubdtype(values.dtype, np.integer):
        grey /= 257.0  # 65,535 -> 255
    elif grey.max() <= 1.0:
        grey *= 255.0
    grey = grey.clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")

"""The feature store: a folder that keeps the 4096 numbers of each photo, so that the CNN sees a photo only once.

The folder has three files: `features.f16` (rows of 4096 half-precision numbers, nothing else), `rows.jsonl` (for each
row, a line with the photo's id and its size in bytes) and `stamp.json` (the encoder that made the features). The
features of a row are written before its line, so a process that is killed leaves at worst features without a line,
which the next process cuts off. Reading maps the file into memory: 123,287 photos are 1.01 GB on disk and need no RAM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from captioner import files, images
from captioner.config import FEATURE_SIZE, EncoderConfig
from captioner.datasets.annotations import Annotations, Example
from captioner.datasets.formats import ImageId
from captioner.errors import FeatureStoreError, ImageError
from captioner.progress import Progress

log = logging.getLogger(__name__)

_ROW_BYTES = 2 * FEATURE_SIZE


class PhotoEncoder(Protocol):
    """A CNN as the store needs it, `networks.encoder.Encoder` for one."""

    @property
    def config(self) -> EncoderConfig:
        """Name of the network, and the size of its photos."""

    @property
    def weights_sha256(self) -> str:
        """Identifies the weights."""

    @property
    def together(self) -> int:
        """Photos that fill the device."""

    def features(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Features `(batch, 4096)` of photos `(batch, 3, height, width)`, RGB, 0 to 255."""


@dataclass(frozen=True)
class Stamp:
    """The encoder that made the features. Features with different stamps are never mixed."""

    encoder: str  # name of the network
    weights_sha256: str  # of its weights, see `weights.fingerprint`
    image_size: int  # height and width that photos are resized to, in pixels
    preprocessing: str  # see `images.PREPROCESSING`
    feature_size: int = FEATURE_SIZE
    dtype: str = "float16"

    @classmethod
    def of(cls, encoder: PhotoEncoder) -> Stamp:
        """The stamp of the features that an encoder computes."""
        config = encoder.config
        return cls(config.name, encoder.weights_sha256, config.image_size, images.PREPROCESSING)


class FeatureStore:
    """Features of photos by id. Any number may read it; one at a time may add to it."""

    def __init__(self, folder: Path, stamp: Stamp) -> None:
        """Open a store, or start one.

        Raises:
            FeatureStoreError: the folder holds features with another stamp; the message says how they differ.
        """
        self.folder = folder
        self.stamp = stamp
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_stamp()
            self._read_rows()
        except OSError as error:
            raise FeatureStoreError(
                f"{folder}: cannot be used as a feature store ({error.strerror or error}); "
                "choose another folder with --features DIR"
            ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._rows

    @property
    def row_of(self) -> dict[ImageId, int]:
        """Photo -> number of its row."""
        return {image_id: row for image_id, (row, _) in self._rows.items()}

    def features(self) -> npt.NDArray[np.float16]:
        """All rows, `(rows, 4096)`, mapped into memory: reading a row reads it from disk."""
        if not self._rows:
            return np.empty((0, FEATURE_SIZE), np.float16)
        return np.memmap(self._data, np.float16, mode="r", shape=(len(self._rows), FEATURE_SIZE))

    def size_of(self, image_id: ImageId) -> int:
        """Size of the photo's file when it was encoded, in bytes; if the file has another size now, it has changed."""
        return self._rows[image_id][1]

    def writer(self, *, wait: bool = False) -> _Writer:
        """A context in which rows can be appended; only one process may be in it, others wait or are refused."""
        return _Writer(self, wait)

    @property
    def _data(self) -> Path:
        return self.folder / "features.f16"

    @property
    def _index(self) -> Path:
        return self.folder / "rows.jsonl"

    def _check_stamp(self) -> None:
        path = self.folder / "stamp.json"
        wanted = dataclasses.asdict(self.stamp)
        if not path.exists():
            files.write(path, json.dumps(wanted, indent=2) + "\n")
            return
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FeatureStoreError(f"{path}: damaged ({error}); delete the folder, it will be made again") from None
        different = [
            f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
            for key in sorted(wanted.keys() | found.keys())
            if found.get(key) != wanted.get(key)
        ]
        if different:
            raise FeatureStoreError(
                f"{self.folder}: these features were made differently: {'; '.join(different)}; "
                "choose another folder with --features"
            )

    def _read_rows(self) -> None:
        """Read the index, of the rows that are wholly there."""
        complete = self._data.stat().st_size // _ROW_BYTES if self._data.exists() else 0
        self._rows: dict[ImageId, tuple[int, int]] = {}  # id -> (row, bytes of the photo)
        self._index_bytes = 0  # of the lines of these rows
        if self._index.exists():
            with self._index.open("rb") as lines:
                for line in lines:
                    if len(self._rows) == complete or not line.endswith(b"\n"):
                        break
                    try:
                        image_id, size = json.loads(line)
                        damaged = image_id in self._rows
                    except (ValueError, TypeError):
                        damaged = True
                    if damaged:
                        raise FeatureStoreError(
                            f"{self._index}:{len(self._rows) + 1}: damaged; delete {self.folder}, it will be made again"
                        )
                    self._rows[image_id] = (len(self._rows), size)
                    self._index_bytes += len(line)


class _Writer:
    """Appends to a store while it holds the store's lock."""

    def __init__(self, store: FeatureStore, wait: bool) -> None:
        self._store, self._wait = store, wait
        self._lock = FileLock(store.folder / "lock")

    def __enter__(self) -> _Writer:
        store = self._store
        try:
            self._lock.acquire(timeout=-1 if self._wait else 0)
        except Timeout:
            raise FeatureStoreError(
                f"{store.folder}: another process is adding features; wait for it, or choose another --features"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            store._read_rows()  # another process may have added rows in the meantime
            for path in (store._data, store._index):
                path.touch()
            self._cut()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise self._unwritable(error) from None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _cut(self) -> None:
        """Cut off rows that are half-written, by a process that was killed or by a write that failed."""
        os.truncate(self._store._data, len(self._store._rows) * _ROW_BYTES)
        os.truncate(self._store._index, self._store._index_bytes)

    def _unwritable(self, error: OSError) -> FeatureStoreError:
        return FeatureStoreError(
            f"{self._store.folder}: cannot be written ({error.strerror or error}); the {len(self._store)} photos "
            "stored so far are kept: make room and run the same command again"
        )

    def append(self, photos: Sequence[tuple[ImageId, int]], features: npt.NDArray[np.floating]) -> None:
        """Add rows.

        Args:
            photos: id and size of the file in bytes, a photo each; none of them is in the store yet.
            features: `(photos, 4096)`; a number too large for half precision becomes the largest that fits.

        Raises:
            FeatureStoreError: the disk is full. The rows that were there before stay.
        """
        assert features.shape == (len(photos), FEATURE_SIZE)
        assert not any(image_id in self._store._rows for image_id, _ in photos)
        limit = np.finfo(np.float16).max
        numbers = features.clip(-limit, limit).astype(np.float16)
        lines = "".join(json.dumps([image_id, size]) + "\n" for image_id, size in photos).encode()
        store = self._store
        try:
            with store._data.open("ab") as file:
                file.write(numbers.tobytes())
                file.flush()
                os.fsync(file.fileno())
            with store._index.open("ab") as file:
                file.write(lines)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            raise self._unwritable(error) from None
        for image_id, size in photos:
            store._rows[image_id] = (len(store._rows), size)
        store._index_bytes += len(lines)


def add_photos(
    store: FeatureStore,
    encoder: PhotoEncoder,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    wait: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[ImageId, ImageError]:
    """Compute and store the features of photos that the store does not hold yet.

    Args:
        store: the store to add to; its stamp is that of the encoder.
        encoder: computes the features.
        examples: the photos.
        batch_size: photos that are encoded together.
        wait: whether to wait for another process that is adding, instead of refusing.
        progress: called with the number of photos that are done, and the number of those to do.

    Returns:
        The photos that could not be decoded, with their reasons. They are not in the store.

    Raises:
        FeatureStoreError: the disk is full, another process is adding, or a photo is not the one that was stored.
    """
    sizes = {example.image_id: _size(example.path) for example in examples}
    for example in examples:
        size = sizes[example.image_id]
        if example.image_id in store and size is not None and store.size_of(example.image_id) != size:
            raise FeatureStoreError(
                f"{store.folder}: holds features of another photo with the id {example.image_id!r} "
                f"({store.size_of(example.image_id):,} bytes; {example.path} has {size:,}); "
                "choose another folder with --features"
            )
    if all(example.image_id in store for example in examples):
        return {}
    failures: dict[ImageId, ImageError] = {}
    with store.writer(wait=wait) as writer:
        wanted = list({example.image_id: example for example in examples if example.image_id not in store}.values())
        done = 0
        progress(done, len(wanted))
        for batch in images.stream([example.path for example in wanted], encoder.config.image_size, batch_size):
            failures |= {wanted[index].image_id: error for index, error in batch.failures.items()}
            if batch.indices:
                vectors = encoder.features(np.asarray(batch.pixels))
                ids = [wanted[index].image_id for index in batch.indices]
                writer.append([(image_id, sizes[image_id] or 0) for image_id in ids], vectors)
            done += len(batch.indices) + len(batch.failures)
            progress(done, len(wanted))
    return failures


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # the file has gone: decoding reports it, unless its features are in the store
        return None


def stored_features(
    annotations: Annotations,
    examples: Sequence[Example],
    encoder: PhotoEncoder,
    folder: Path | None = None,
    *,
    shown: bool = True,
    wait: bool = False,
) -> tuple[FeatureStore, dict[ImageId, ImageError]]:
    """Open the store of a data set, after the features that it lacks have been computed and added.

    Args:
        annotations: the data set.
        examples: its photos whose features are wanted.
        encoder: computes the features.
        folder: of the store; by default one in `~/.cache/captioner` for each set of photos and encoder.
        shown: whether to draw a progress bar.
        wait: see `add_photos`.

    Returns:
        The store, and the photos that could not be decoded, with the reasons.

    Raises:
        FeatureStoreError: the folder holds other features, or cannot be written.
    """
    stamp = Stamp.of(encoder)
    store = FeatureStore(folder or default_folder(annotations, stamp), stamp)
    log.info("features of %s are kept in %s", stamp.encoder, store.folder)
    with Progress("features", 0, "photos", shown=shown) as progress:
        failures = add_photos(store, encoder, examples, batch_size=encoder.together, wait=wait, progress=progress.set)
    for error in failures.values():
        log.warning("left out: %s", error)
    return store, failures


def default_folder(annotations: Annotations, stamp: Stamp) -> Path:
    """The folder of a data set's features where none is given: one for each set of photos and encoder."""
    photos = sorted({str(example.path.parent) for example in annotations.examples})
    place = hashlib.sha256(json.dumps([photos, dataclasses.asdict(stamp)]).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{annotations.name}-{stamp.encoder}-{stamp.image_size}-{place}"
    return cache / "captioner" / "features" / name

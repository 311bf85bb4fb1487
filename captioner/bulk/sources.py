"""Where photos come from: folders, lists of files, WebDataset shards and Parquet files.

A source is a function that yields an `Item` for each photo, in an order that does not change between runs, and one
with an error for each place where photos could not be looked for.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import stat
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from captioner import images
from captioner.bulk.job import Job
from captioner.errors import CaptionerError, ImageError, missing_extra

#: The ending of a WebDataset shard, at the end of a path or before a slash, behind which a member is named.
SHARD = re.compile(r"\.(?:tar(\.(?:gz|bz2|xz|zst))?|(tgz|tbz2?|txz|tzst))(?=/|$)", re.IGNORECASE)

#: A photo in a compressed shard is decompressed into memory up to so many bytes.
_LARGEST = 512 << 20

#: Parquet columns that hold photos, in the order in which they are looked for.
_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "photo", "bytes", "content", "image_bytes")


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of a file: a member of a tar."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Remote:
    """A file somewhere else, by an address that fsspec knows, such as `s3://bucket/photo.jpg`."""

    url: str


class Item(NamedTuple):
    """A photo to caption."""

    id: str  # stays the same from run to run: an absolute path
    image: str  # path as found; in a shard, "shard.tar/member.jpg"; in Parquet, "file.parquet/row"
    content: str | bytes | Slice | Remote  # the photo, or the path of its file
    size: int = -1  # bytes; -1 where that is not known
    modified: int = -1  # time of the last change, nanoseconds since 1970
    error: ImageError | None = None  # why there is no photo

    def read(self) -> str | bytes:
        """The content in a form that `images.load` takes; a file is named and not read.

        Raises:
            OSError: the shard cannot be read any more.
        """
        if isinstance(self.content, Remote):
            with _fsspec().open(self.content.url, "rb") as file:
                return bytes(file.read())
        if not isinstance(self.content, Slice):
            return self.content
        with open(self.content.path, "rb") as shard:  # noqa: PTH123 (str)
            shard.seek(self.content.offset)
            return shard.read(self.content.size)

    def sha256(self) -> str | None:
        """SHA-256 of the content; none if it cannot be read."""
        try:
            content = self.read()
            if isinstance(content, bytes):
                return hashlib.sha256(content).hexdigest()
            digest = hashlib.sha256()
            with images.open_file(content) as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            return digest.hexdigest()
        except (OSError, ImageError, ValueError):
            return None


def find(job: Job) -> Iterator[Item]:
    """Every photo of a job.

    Raises:
        CaptionerError: a path of the job does not exist, or is of a kind that cannot be read.
    """
    for path in job.photos:
        check(path, job)
    for path in job.photos:
        yield from _source(path)(path, job)
    if job.list is not None:
        yield from listed(job.list)


def reader(job: Job) -> Callable[[str], bytes]:
    """A function that reads photos of a job once more, by their ids, in the order of the job.

    Files are opened by their paths. Shards and Parquet files are gone through once, along with the ids. The function
    raises an `ImageError` for a photo that cannot be read any more.
    """
    inside = (item for path in job.photos if _source(path) in (shard, parquet) for item in _source(path)(path, job))

    def read(id_: str) -> bytes:
        try:
            if _is_remote(id_):
                item = Item(id_, id_, Remote(id_))
            elif _is_inside(id_):
                gone = ImageError(f"{id_}: is not there any more; give the same command again", "missing")
                item = next((item for item in inside if item.id == id_), Item(id_, id_, b"", error=gone))
            else:
                return images.read(id_)
            if item.error is not None:
                raise item.error
            content = item.read()
        except OSError as error:
            raise ImageError(f"{id_}: cannot be read ({error.strerror or error}); see to its place") from None
        assert isinstance(content, bytes)
        return content

    return read


def _is_inside(id_: str) -> bool:
    """Whether a path leads into a file, as if the file were a folder."""
    try:
        os.stat(id_)  # noqa: PTH116
    except NotADirectoryError:
        return True
    except (OSError, ValueError):
        pass
    return False


def some(items: Iterator[Item], count: int, size: int) -> Iterator[Item]:
    """The next items: so many, or fewer if the photos that they hold in memory have more bytes than `size`."""
    for item in itertools.islice(items, count):
        yield item
        if isinstance(item.content, bytes):
            size -= len(item.content)
            if size < 0:
                return


def blocks(items: Iterator[Item], part: Callable[[Iterator[Item]], Iterable[Item]]) -> Iterator[list[Item]]:
    """Divide items into lists; a source that ends in an error yields what came before it first.

    Args:
        items: of a source.
        part: takes the items of the next list.
    """
    while True:
        block: list[Item] = []
        try:
            block.extend(part(items))
        except Exception:
            if block:
                yield block
            raise
        if not block:
            return
        yield block


def count(job: Job) -> int:
    """How many photos a job has, as far as that is quickly told: those in compressed shards are not counted."""
    total = 0
    for path in job.photos:
        source = _source(path)
        if source is parquet:
            total += _parquet_file(path).metadata.num_rows
        elif source is shard and _is_packed(path):
            continue
        elif source is folder:
            total += sum(1 for _ in _walk(path, job))
        else:
            total += sum(1 for _ in source(path, job))
    if job.list is not None and job.list != "-":
        total += sum(1 for _ in _names(job.list))
    return total


def holds_many(path: str) -> bool:
    """Whether a path that a user gave is more than one photo."""
    return _source(path) is not file


def in_folder(path: str) -> bool:
    """Whether the photos that a user's path leads to are files of their own on this machine."""
    return _source(path) in (file, folder)


def check(path: str, job: Job) -> None:
    """Refuse a path that a user gave and that leads to no photo, before work begins on others.

    Raises:
        ImageError: it is not there or may not be looked at, or is a folder without a photo.
        CaptionerError: it is a shard that is compressed in a way that cannot be read.
    """
    _source(path)
    if not _is_remote(path) and images.is_folder(Path(path)) and next(_walk(path, job), None) is None:
        raise images.no_photo(path)


def _source(path: str) -> Callable[[str, Job], Iterator[Item]]:
    if _is_remote(path):
        return remote
    if os.path.isdir(path):  # noqa: PTH112
        return folder
    if path.lower().endswith(".parquet"):
        return parquet
    if not SHARD.search(os.path.basename(path)):  # noqa: PTH119
        return file
    if path.lower().endswith("zst") and sys.version_info < (3, 14):
        raise CaptionerError(f"{path}: is compressed as this Python cannot read it (3.14 can); decompress it: zstd -d")
    return shard


def _is_packed(path: str) -> bool:
    return not path.lower().endswith(".tar")


def file(path: str, job: Job) -> Iterator[Item]:
    """One photo."""
    yield _of_file(path, os.path.abspath(path))  # noqa: PTH100


def folder(path: str, job: Job) -> Iterator[Item]:
    """The photos in a folder; see `images.walk`."""
    found = False
    absolute = os.path.abspath(path)  # noqa: PTH100
    start = len(path.rstrip("/"))  # of the rest of a photo's path, which begins with a slash
    other: list[str] = []
    for photo, error in _walk(path, job, other):
        found = True
        id_ = absolute + photo[start:] if start and photo != path else os.path.abspath(photo)  # noqa: PTH100
        yield _of_file(photo, id_) if error is None else Item(id_, photo, photo, error=error)
    images.say_left_out(other)
    if not found:
        raise images.no_photo(path)


def _walk(path: str, job: Job, other: list[str] | None = None) -> Iterator[tuple[str, ImageError | None]]:
    photos = images.walk(path, recursive=not job.not_recursive, hidden=job.hidden, other=other)
    return _chosen(photos, len(path), job) if job.include or job.exclude else photos


def _chosen(
    photos: Iterator[tuple[str, ImageError | None]], start: int, job: Job
) -> Iterator[tuple[str, ImageError | None]]:
    """The photos whose path, from a place on, matches the globs of a job."""
    wanted, left_out = _matcher(job.include), _matcher(job.exclude)
    for photo, error in photos:
        inside = photo[start:].lstrip("/")
        if error is not None or ((wanted is None or wanted(inside)) and (left_out is None or not left_out(inside))):
            yield photo, error


def _matcher(globs: tuple[str, ...]) -> Callable[[str], bool] | None:
    """Whether a path in a folder, or the name at its end, matches one of some globs."""
    if not globs:
        return None
    pattern = re.compile("|".join(fnmatch.translate(glob) for glob in globs))
    return lambda path: bool(pattern.match(path) or pattern.match(path.rsplit("/", 1)[-1]))


def listed(path: str) -> Iterator[Item]:
    """Photos whose paths a file lists, one a line, or separated by NUL bytes, in whose case names may hold newlines."""
    for name in _names(path):
        yield _of_file(name, os.path.abspath(name))  # noqa: PTH100


def _names(path: str) -> Iterator[str]:
    try:
        with _binary(path) as source:
            rest = source.read(1 << 16)
            separator = b"\0" if b"\0" in rest else b"\n"
            while rest:
                *whole, rest = rest.split(separator)
                yield from (os.fsdecode(name.rstrip(b"\r")) for name in whole if name.strip())
                block = source.read(1 << 16)
                if not block:
                    break
                rest += block
            if rest.strip():
                yield os.fsdecode(rest.rstrip(b"\r"))
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be read ({error.strerror}); give a file that lists photos") from None


def _binary(path: str) -> IO[bytes]:
    if path == "-":
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    return open(path, "rb")  # noqa: PTH123


def _of_file(path: str, id_: str) -> Item:
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # decoding says why
        return Item(id_, path, path)
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Item(id_, path, path, size, status.st_mtime_ns)


class _Member(tarfile.TarInfo):
    """A member of a tar. One whose header is broken is an error; tarfile by itself takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None


def shard(path: str, job: Job) -> Iterator[Item]:
    """The photos in a WebDataset shard, which is a tar; nothing is unpacked into files.

    Workers read photos from the tar where they lie; those of a compressed one are passed on in memory. A shard that
    breaks off yields the photos before its end, and an error.
    """
    absolute, packed = os.path.abspath(path), _is_packed(path)  # noqa: PTH100
    try:
        status = os.stat(path)  # noqa: PTH116
        with tarfile.open(path, "r|*" if packed else "r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which tarfile would keep in memory
                ending = os.path.splitext(member.name)[1].lower()  # noqa: PTH122
                if ending not in images.EXTENSIONS or member.isdir():
                    continue
                name = f"{path}/{member.name}"
                content: bytes | Slice = b""
                error = None
                if not member.isreg() or member.sparse is not None:
                    error = ImageError(f"{name}: is a link or no plain file; put the photo itself there", "special")
                elif packed and member.size > _LARGEST:
                    error = ImageError(f"{name}: has more than {_LARGEST >> 20} MiB; decompress the shard", "too large")
                elif packed:
                    unpacked = tar.extractfile(member)
                    assert unpacked is not None
                    content = unpacked.read()
                elif member.offset_data + member.size > status.st_size:
                    said = f"{name}: lies beyond the end of the shard; fetch the shard again"
                    yield Item(f"{absolute}/{member.name}", name, b"", error=ImageError(said, "damaged"))
                    return
                else:
                    content = Slice(path, member.offset_data, member.size)
                yield Item(f"{absolute}/{member.name}", name, content, member.size, status.st_mtime_ns, error)
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = f"{path}: is no tar, or is damaged ({reason}); fetch the shard again"
        yield Item(absolute, path, path, error=ImageError(said, "damaged"))


def _is_remote(path: str) -> bool:
    return "://" in path and not re.match(r"https?:", path)


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise missing_extra("ray", "fsspec") from None
    return fsspec


def remote(path: str, job: Job) -> Iterator[Item]:
    """A photo, or the photos in a folder, at an address that fsspec knows."""
    try:
        system, root = _fsspec().core.url_to_fs(path)
        found = system.find(root, maxdepth=1 if job.not_recursive else None, detail=True)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptionerError(
            f"{path}: cannot be looked at ({reason}); give a photo or folder that may be read"
        ) from None
    if not found:
        raise images.no_photo(path)
    for name in sorted(found):
        if os.path.splitext(name)[1].lower() in images.EXTENSIONS:  # noqa: PTH122
            url, about = system.unstrip_protocol(name), found[name]
            stamp = int(about["mtime"] * 1e9) if isinstance(about.get("mtime"), float) else -1
            yield Item(url, url, Remote(url), int(about.get("size") or -1), stamp)


def parquet(path: str, job: Job) -> Iterator[Item]:
    """The photos in a Parquet file: a column of bytes, or of `{bytes, path}` as Hugging Face's `datasets` writes it."""
    absolute = os.path.abspath(path)  # noqa: PTH100
    modified = os.stat(path).st_mtime_ns  # noqa: PTH116
    table = _parquet_file(path)
    column = _column(table.schema_arrow, path)
    row = 0
    try:
        for batch in table.iter_batches(batch_size=32, columns=[column]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if isinstance(value, dict) else value
                name, id_ = f"{path}/{row}", f"{absolute}/{row}"
                row += 1
                if content is None:
                    error = ImageError(f"{name}: has no bytes; put the photo itself into the column", "missing")
                    yield Item(id_, name, b"", error=error)
                else:
                    yield Item(id_, name, content, len(content), modified)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        said = ImageError(f"{path}: is damaged after row {row} ({reason}); fetch the file again", "damaged")
        yield Item(f"{absolute}/{row}", f"{path}/{row}", b"", error=said)


def _parquet_file(path: str) -> Any:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing_extra("bulk", "pyarrow") from None
    try:
        return ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptionerError(f"{path}: is no Parquet file, or is damaged ({reason}); fetch it again") from None


def _column(schema: Any, path: str) -> str:
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def holds_photos(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(
                kind.field(i).name == "bytes" and holds_bytes(kind.field(i).type) for i in range(kind.num_fields)
            )
        return holds_bytes(kind)

    possible = [field.name for field in schema if holds_photos(field.type)]
    named = [name for name in _COLUMNS if name in possible]
    if not possible:
        there = ", ".join(schema.names)
        raise CaptionerError(f"{path}: has no column of photos (bytes), only {there}; give one that has")
    if not named and len(possible) > 1:
        raise CaptionerError(
            f"{path}: has several columns of bytes ({', '.join(possible)}); name the photos' one 'image'"
        )
    return (named or possible)[0]

"""Captions -> one file: JSON lines, CSV, Parquet, COCO's result format, or a WebDataset shard.

A writer is a function that takes rows in the order of the source and writes them to a file. The file has its name only
once it is complete. The same rows (and photos) give the same bytes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from captioner import images
from captioner.bulk.job import Format
from captioner.bulk.journal import Found, Row
from captioner.bulk.sources import SHARD
from captioner.errors import CaptionerError, ImageError, missing_extra

#: Rows that are compressed together in a Parquet file.
_ROW_GROUP = 10_000

#: Photos in a WebDataset shard, where the output is several.
_SHARD = 10_000

#: The place of a shard's number in a name.
_NUMBER = re.compile(r"%0?(\d?)d")


@dataclass(frozen=True)
class Style:
    """Which columns are written beside the photo and its caption."""

    details: bool = False
    alternatives: bool = False  # more captions than the best
    satisfied: bool = False  # whether the caption has all required words
    provenance: Mapping[str, Any] | None = None  # model and options


def as_dict(row: Row, style: Style) -> dict[str, Any]:
    """A row as it is written."""
    best = row.captions[0]
    written: dict[str, Any] = {"image": row.image, "caption": best.text}
    if style.satisfied:
        written["satisfied"] = best.satisfied
    if style.alternatives:
        written["captions"] = [{"caption": c.text, "score": c.score, "logprob": c.logprob} for c in row.captions]
    if style.details:
        written |= {"logprob": best.logprob, "bytes": row.size, "sha256": row.sha256, "time": row.done}
        written |= style.provenance or {}
    return written


def write(format_: Format, rows: Iterator[Row], path: Path, style: Style) -> None:
    """Write rows to a file.

    Raises:
        CaptionerError: it cannot be written; an earlier file of that name is as it was.
    """
    _WRITERS[format_](rows, path, style)


def as_json(value: object) -> str:
    """A value as one line of JSON; text with line separators or bytes that are not UTF-8 is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when it is complete.

    Raises:
        CaptionerError: it cannot be written; nothing is left behind, and an earlier file of that name is as it was.
    """
    try:
        target = path.resolve()
        part = target.with_name(target.name + ".part")
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CaptionerError(
            f"{path}: cannot be written ({error.strerror}); the captions are kept in the journal: make room or give "
            "another --output, and give the same command again"
        ) from None


def _jsonl(rows: Iterator[Row], path: Path, style: Style) -> None:
    with whole(path) as file:
        for row in rows:
            file.write(as_json(as_dict(row, style)).encode() + b"\n")


def _csv(rows: Iterator[Row], path: Path, style: Style) -> None:
    with whole(path) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(as_dict(_EXAMPLE, style))
        for row in rows:
            values = as_dict(row, style).values()
            writer.writerow([as_json(value) if isinstance(value, list | dict) else value for value in values])
        file.flush()
        file.detach()


def _coco(rows: Iterator[Row], path: Path, style: Style) -> None:
    """A list of `{"image_id", "caption"}`, where the id is the number at the end of the name, if there is one."""
    with whole(path) as file:
        separator = b"[\n"
        for row in rows:
            image_id = coco_id(row.image)
            file.write(separator + as_json({"image_id": image_id, "caption": row.captions[0].text}).encode())
            separator = b",\n"
        file.write(b"\n]\n" if separator == b",\n" else b"[]\n")


def coco_id(image: str) -> int | str:
    """`COCO_val2014_000000000042.jpg` -> 42, `a dog.jpg` -> "a dog"."""
    stem = image.rsplit("/", 1)[-1].rpartition(".")[0] or image
    number = re.fullmatch(r"(?:.*[^0-9])?([0-9]{1,18})", stem, re.DOTALL)
    return int(number[1]) if number else stem


def webdataset(
    rows: Iterable[Row], path: Path, style: Style, read: Callable[[str], bytes] | None, *, several: bool = False
) -> Iterator[tuple[Row, ImageError]]:
    """Write each photo, its caption (`.txt`) and its row (`.json`) under one key, with one photo in memory.

    A photo of a shard keeps its name, others are numbered.

    Args:
        rows: photos that have captions.
        path: the shard; with %05d or the like in its name, as many as are needed, each with `_SHARD` photos.
        style: of the rows.
        read: reads a photo by its id; none leaves the photos out.
        several: photos of shards are put into a folder named after their shard, since shards may have names in common.

    Yields:
        Photos that cannot be read any more or have changed, and are left out.
    """
    numbered = enumerate(rows)
    for shard in itertools.count():
        some = itertools.islice(numbered, _SHARD) if is_numbered(path) else numbered
        first = next(some, None)
        if first is None and shard:
            break
        yield from _shard(itertools.chain([first] if first else [], some), nth(path, shard), style, read, several)
        if not is_numbered(path):
            return
    while (left := nth(path, shard)).exists():  # of an earlier run that had more photos
        left.unlink()
        shard += 1


def is_numbered(path: Path) -> bool:
    """Whether the name of an output stands for several, as `captions-%05d.tar` does."""
    return len(_NUMBER.findall(path.name)) == 1


def nth(path: Path, number: int) -> Path:
    """A shard's path: `captions-%05d.tar` -> `captions-00000.tar`; one without a place for a number stays as it is."""
    if not is_numbered(path):
        return path
    return path.with_name(_NUMBER.sub(lambda place: f"{number:0{place[1] or 1}}", path.name))


def _shard(
    numbered: Iterable[tuple[int, Row]],
    path: Path,
    style: Style,
    read: Callable[[str], bytes] | None,
    several: bool,
) -> Iterator[tuple[Row, ImageError]]:
    with whole(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            tar.members = []  # type: ignore[attr-defined]  # which tarfile would keep in memory

        last = ""
        for number, row in numbered:
            try:
                photo = b"" if read is None else _unchanged(row, read)
                name = _name(row, number, photo, several)
            except ImageError as error:
                yield row, error
                continue
            key = re.sub(r"(?<=[^/])\.[^/]*$", "", name)
            # The second photo under a key, as 1.png after 1.jpg, has its caption in 1.png.txt.
            stem, last = (name, last) if key == last else (key, key)
            if read is not None:
                add(name, photo)
            add(f"{stem}.json", as_json(as_dict(row, style)).encode())
            add(f"{stem}.txt", row.captions[0].text.encode())


def _unchanged(row: Row, read: Callable[[str], bytes]) -> bytes:
    photo = read(row.id)
    if row.size not in (-1, len(photo)):
        raise ImageError(f"{row.image}: has changed since it was captioned; give the same command again", "changed")
    return photo


def _name(row: Row, number: int, photo: bytes, several: bool) -> str:
    """The name of a photo in the shard that is written."""
    if shard := SHARD.search(row.image):
        member = row.image[shard.end() + 1 :]
        if ".." not in member.split("/") and not member.startswith("/"):  # such names leave the folder of the user
            return f"{row.image[: shard.start()].rsplit('/', 1)[-1]}/{member}" if several else member
    ending = os.path.splitext(row.image)[1].lower()  # noqa: PTH122
    if ending not in images.EXTENSIONS:
        ending = images.ending(photo) if photo else ""
    return f"{number:09}{ending}"


def _parquet(rows: Iterator[Row], path: Path, style: Style) -> None:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise missing_extra("bulk", "pyarrow") from None
    fields = {name: pa.string() for name in as_dict(_EXAMPLE, style)}
    fields |= {"satisfied": pa.bool_()} if style.satisfied else {}
    if style.alternatives:
        one = pa.struct([("caption", pa.string()), ("score", pa.float64()), ("logprob", pa.float64())])
        fields["captions"] = pa.list_(one)
    fields |= {"logprob": pa.float64(), "bytes": pa.int64()} if style.details else {}
    schema = pa.schema(list(fields.items()))
    with whole(path) as file, ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, _ROW_GROUP)):
            columns: dict[str, list[Any]] = {name: [] for name in fields}
            for row in group:
                for name, value in as_dict(row, style).items():
                    columns[name].append(_utf8(value) if isinstance(value, str) else _flat(value))
            writer.write_table(pa.table(columns, schema=schema))


def _flat(value: Any) -> Any:
    return as_json(value) if isinstance(value, dict) else value


def _utf8(text: str) -> str:
    """Parquet holds UTF-8 alone: other bytes of a name are written with a backslash, as Python writes them."""
    return os.fsencode(text).decode("utf-8", errors="backslashreplace")


#: A row that shows which columns there are.
_EXAMPLE = Row("", (Found("", 0.0, 0.0),))

_WRITERS: dict[str, Callable[[Iterator[Row], Path, Style], None]] = {
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
    "coco": _coco,
}


def write_failures(rows: Iterator[Row], path: Path) -> int:
    """List the photos that failed, as JSON lines of image, class and reason; no failures, no file.

    Returns:
        How many there are.
    """
    count = 0
    with whole(path) as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(as_json({"image": row.image, "class": row.kind, "reason": row.reason}).encode() + b"\n")
    if not count:
        path.unlink()
    return count

"""Captions -> one file: JSON lines, CSV, Parquet, COCO's result format, or a WebDataset shard.

A writer is a function that takes rows in the order of the source and writes them to a file. The file has its name only
once it is complete. The same rows give the same bytes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from captioner.bulk.job import Format
from captioner.bulk.journal import Found, Row
from captioner.errors import CaptionerError, missing_extra

#: Rows that are compressed together in a Parquet file.
_ROW_GROUP = 10_000


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


def _webdataset(rows: Iterator[Row], path: Path, style: Style) -> None:
    """A shard with a `.txt` and a `.json` for each photo.

    Photos of a shard keep their key, so that both shards can be read side by side; others are numbered.
    """
    with whole(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for number, row in enumerate(rows):
            _, in_shard, member = row.image.partition(".tar/")
            key = re.sub(r"(?<=[^/])\.[^/]*$", "", member) if in_shard else f"{number:09}"
            described = as_json(as_dict(row, style)).encode()
            for ending, content in (("json", described), ("txt", row.captions[0].text.encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            tar.members = []  # type: ignore[attr-defined]  # which tarfile would keep in memory


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
    "webdataset": _webdataset,
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

"""The record of finished work: one SQLite file, which is the truth that every output is made from.

A photo's row is committed when its captions are known. A run that is killed at any moment therefore loses at most the
photos that it had in hand, and the next run finds all others. Outputs are written from the journal, in the order of
the source, so that they do not depend on how often the run was stopped.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from captioner.bulk.sources import Item, blocks, some
from captioner.errors import CaptionerError, ImageError

#: Photos that are looked up at once.
_BLOCK = 512

#: Bytes of photos in memory that are looked up at once.
_BLOCK_BYTES = 32 << 20

#: By these, a photo is told to be as it was.
_COMPARED = operator.attrgetter("id", "image", "size", "modified")

#: The number of this application in the header of the file ("cptn"), by which it is known.
_APPLICATION = 0x6370746E

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS photos (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that the index tells old captions from new ones
    id TEXT NOT NULL UNIQUE,    -- absolute path
    image TEXT NOT NULL,        -- path as found
    size INTEGER NOT NULL,      -- bytes, or -1
    modified INTEGER NOT NULL,  -- nanoseconds since 1970, or -1
    sha256 TEXT,                -- of the content, where it was asked for
    captions TEXT,              -- JSON, best first: [[text, log-probability, score, satisfied], ...]; NULL: it failed
    kind TEXT,                  -- class of the failure
    reason TEXT,                -- the failure in one line
    done TEXT NOT NULL          -- time, UTC
);
CREATE INDEX IF NOT EXISTS by_content ON photos (sha256) WHERE sha256 IS NOT NULL;
-- The order of the source: place -> photo. Photos that the source no longer has are in no place.
CREATE TABLE IF NOT EXISTS places (place INTEGER PRIMARY KEY, number INTEGER NOT NULL UNIQUE);
"""


#: After this, what was made from the journal (the index) is no longer up to date.
_CHANGED = "DELETE FROM settings WHERE name='indexed'"


@dataclass(frozen=True, slots=True)
class Found:
    """A caption, as it is kept."""

    text: str
    logprob: float
    score: float
    satisfied: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """A photo that has its captions, or has failed."""

    image: str
    captions: tuple[Found, ...] = ()  # best first
    size: int = -1  # bytes
    sha256: str | None = None
    done: str = ""  # time, UTC
    kind: str = ""  # class of the failure
    reason: str = ""  # the failure in one line
    id: str = ""  # absolute path


class Todo(NamedTuple):
    """A photo to caption, and its place in the source."""

    place: int
    item: Item


#: A photo, its captions or the error, its SHA-256 if known, and the time.
Result = tuple[Todo, Sequence[Found] | ImageError, str | None, str]


@dataclass
class Counts:
    """The photos that a run found in its sources."""

    found: int = 0  # places in the source
    known: int = 0  # photos that were done before
    failed: int = 0  # photos that failed before and are not tried again
    changed: int = 0  # photos that were done before, and have changed since
    renamed: int = 0  # photos that are known by their content
    twice: int = 0  # photos that the source names again
    removed: int = 0  # photos that were done before, and that the source no longer has
    removed_example: str = ""


class Journal:
    """The journal of one output. One process at a time has it open."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Open a journal, or begin one.

        Args:
            path: its file.
            settings: what captions depend on; a journal with others is refused.
            overwrite: begin anew, whatever the file holds.

        Raises:
            CaptionerError: it is in use, belongs to other settings, is no journal, or cannot be written.
        """
        self.path = path
        self.counts = Counts()
        self._aligned = True  # so far, the source has been as the journal remembers it
        try:
            with _explained(path):
                self._base = self._connect(settings, overwrite)
        except CaptionerError:
            self.close()
            raise

    def _connect(self, settings: Mapping[str, Any], overwrite: bool) -> sqlite3.Connection:
        if self.path.exists() and not self.path.is_file():
            raise CaptionerError(f"{self.path}: is no file; give another --output or --journal")
        base = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        self._base = base
        base.execute("PRAGMA locking_mode=EXCLUSIVE")  # the lock goes with the process, however it ends
        try:
            is_mine = is_journal(base)
            is_empty = not base.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            if "not a database" not in str(error):
                raise
            is_mine = is_empty = False
        if not is_mine and not is_empty:
            raise CaptionerError(f"{self.path}: is there and is no journal; give another --output or --journal")
        if not is_mine:
            base.execute(f"PRAGMA application_id={_APPLICATION}")
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("PRAGMA synchronous=NORMAL")
        base.execute("BEGIN EXCLUSIVE")
        if overwrite:
            for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
                if name in ("settings", "photos", "places", "search"):
                    base.execute(f"DROP TABLE {name}")
        for statement in _SCHEMA.split(";\n"):
            base.execute(statement)
        wanted = json.dumps(settings, sort_keys=True)
        stored = dict(base.execute("SELECT name, value FROM settings"))
        base.execute("INSERT OR IGNORE INTO settings VALUES ('settings', ?)", [wanted])
        base.execute("COMMIT")
        if difference := _difference(json.loads(stored.get("settings", wanted)), json.loads(wanted)):
            raise CaptionerError(
                f"{self.path}: was made with {difference}; give the same, or another --output, or begin anew with "
                "--overwrite"
            )
        return base

    def close(self) -> None:
        """Let other processes have it."""
        if base := getattr(self, "_base", None):
            base.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Which photos are to be done

    def todo(self, items: Iterable[Item], *, retry_failed: bool, by_content: bool) -> Iterator[Todo]:
        """Pass on the photos that are not done yet, and note the places of those that are.

        As long as the source is as it was, the journal is read along with it and nothing is written or looked up.
        """
        place = 0
        with ThreadPoolExecutor() if by_content else _no_pool() as pool:
            for block in blocks(iter(items), lambda rest: some(rest, _BLOCK, _BLOCK_BYTES)):
                if not by_content and self._unchanged(place, block):
                    self.counts.known += len(block)
                    self.counts.found = place = place + len(block)
                    continue
                hashes = list(pool.map(Item.sha256, block)) if pool is not None else [None] * len(block)
                known = self._along(place, block)
                placed = []
                for item, sha256 in zip(block, hashes, strict=True):
                    before = known.get(item.id)
                    if before is None and sha256 is not None:
                        before = self._renamed(item, sha256)
                    if before is not None and self._is_done(before, item, sha256, retry_failed):
                        if not before.aligned:
                            placed.append((place, before.number))
                        if before.image != item.image:
                            self._execute(
                                "UPDATE photos SET image=? WHERE number=?", [_text(item.image), before.number]
                            )
                    else:
                        yield Todo(place, item)
                    place += 1
                self.counts.found = place
                if placed:
                    self._place(placed)

    def _unchanged(self, place: int, block: Sequence[Item]) -> bool:
        """Whether all photos of a block are done and in their places: quickly told, of a million in seconds."""
        if not self._aligned:
            return False
        rows = self._execute(
            "SELECT id, image, size, modified FROM places JOIN photos USING (number) "
            "WHERE place >= ? AND place < ? AND captions IS NOT NULL ORDER BY place",
            [place, place + len(block)],
        )
        return rows == list(map(_COMPARED, block))

    def _along(self, place: int, block: Sequence[Item]) -> dict[str, _Known]:
        """The records of a block of photos, by id."""
        known: dict[str, _Known] = {}
        columns = "photos.number, id, image, size, modified, sha256, captions IS NOT NULL"
        if self._aligned:
            rows = self._execute(
                f"SELECT place, {columns} FROM places JOIN photos USING (number) WHERE place >= ? AND place < ?",
                [place, place + len(block)],
            )
            expected = {item.id: place + index for index, item in enumerate(block)}
            for row_place, *values in sorted(rows):
                found = _Known(*values, aligned=True)
                name = name_of(found.id)
                if expected.get(name) != row_place:
                    self._aligned = False
                    self._execute(_CHANGED)
                    self._execute("DELETE FROM places WHERE place >= ?", [row_place])
                    break
                known[name] = found
        unknown = [_text(item.id) for item in block if item.id not in known]
        if unknown:
            marks = ",".join("?" * len(unknown))
            for values in self._execute(f"SELECT {columns} FROM photos WHERE id IN ({marks})", unknown):
                known[name_of(values[1])] = _Known(*values, aligned=False)
        return known

    def _is_done(self, before: _Known, item: Item, sha256: str | None, retry_failed: bool) -> bool:
        if sha256 is not None and before.sha256 is not None:
            same = sha256 == before.sha256
        else:
            same = (item.size, item.modified) == (before.size, before.modified)
        if not before.captioned:
            self.counts.failed += same and not retry_failed
            return same and not retry_failed
        self.counts.known += same
        self.counts.changed += not same
        return same

    def _renamed(self, item: Item, sha256: str) -> _Known | None:
        """Give a photo that is new by its name, and known by its content, the captions that it had."""
        rows = self._execute("SELECT captions, done FROM photos WHERE sha256=? AND captions IS NOT NULL", [sha256])
        row = next(iter(rows), None)
        if row is None:
            return None
        self.counts.renamed += 1
        values = [_text(item.id), _text(item.image), item.size, item.modified, sha256, *row]
        self._execute("INSERT INTO photos VALUES (NULL, ?, ?, ?, ?, ?, ?, NULL, NULL, ?)", values)
        (number,) = self._execute("SELECT last_insert_rowid()")[0]
        return _Known(number, item.id, item.image, item.size, item.modified, sha256, 1, aligned=False)

    def _place(self, placed: Sequence[tuple[int, int]]) -> None:
        with self._transaction() as base:
            before = base.total_changes
            base.executemany("INSERT OR IGNORE INTO places VALUES (?, ?)", placed)
            self.counts.twice += len(placed) - (base.total_changes - before)

    # What became of them

    def record(self, results: Sequence[Result]) -> None:
        """Note what became of photos."""
        if not results:
            return
        with self._transaction() as base:
            base.execute(_CHANGED)
            for (place, item), outcome, sha256, done in results:
                captions = kind = reason = None
                if isinstance(outcome, ImageError):
                    kind, reason = outcome.kind, _text(str(outcome))
                else:
                    kept = [[c.text, round(c.logprob, 4), round(c.score, 4), c.satisfied] for c in outcome]
                    captions = json.dumps(kept, ensure_ascii=False, separators=(",", ":"))
                before = base.execute("DELETE FROM photos WHERE id=? RETURNING number", [_text(item.id)]).fetchone()
                number = base.execute(
                    "INSERT INTO photos VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        _text(item.id), _text(item.image), item.size, item.modified, sha256, captions, kind, reason,
                        done,
                    ],
                ).lastrowid  # fmt: skip
                if before is not None:
                    base.execute("UPDATE places SET number=? WHERE number=?", [number, *before])
                base.execute("INSERT OR IGNORE INTO places VALUES (?, ?)", [place, number])

    def complete(self) -> None:
        """Note that the source has no more photos: those that it no longer has leave the output, and stay known."""
        with self._transaction() as base:
            if base.execute("DELETE FROM places WHERE place >= ?", [self.counts.found]).rowcount:
                base.execute(_CHANGED)
            # Each place has a photo: in most runs, both are as many, and nothing has to be looked for.
            (left,) = base.execute("SELECT (SELECT COUNT(*) FROM photos) - (SELECT COUNT(*) FROM places)").fetchone()
            if not left:
                return
            where = "FROM photos WHERE captions IS NOT NULL AND number NOT IN (SELECT number FROM places)"
            (self.counts.removed,) = base.execute(f"SELECT COUNT(*) {where}").fetchone()
            if self.counts.removed:
                (image,) = base.execute(f"SELECT image {where} LIMIT 1").fetchone()
                self.counts.removed_example = name_of(image)

    # What outputs are made from

    def rows(self) -> Iterator[Row]:
        """Photos that have captions, in the order of the source."""
        columns = "image, captions, size, sha256, done, id"
        for image, captions, size, sha256, done, id_ in self._in_order(columns, "captions"):
            found = tuple(itertools.starmap(Found, json.loads(captions)))
            yield Row(name_of(image), found, size, sha256, done, id=name_of(id_))

    def failures(self) -> Iterator[Row]:
        """Photos that failed, and those that could not be written with their captions, in the order of the source."""
        for image, kind, reason, size, done in self._in_order("image, kind, reason, size, done", "kind"):
            yield Row(name_of(image), size=size, kind=kind, reason=name_of(reason), done=done)

    def refused(self, failures: Iterable[tuple[Row, ImageError]]) -> int:
        """Note the photos whose captions could not be written with them; the captions are kept. Returns how many."""
        self._execute("UPDATE photos SET kind=NULL, reason=NULL WHERE captions IS NOT NULL AND kind IS NOT NULL")
        count = 0
        for row, error in failures:
            count += 1
            values = [error.kind, _text(str(error)), _text(row.id)]
            self._execute("UPDATE photos SET kind=?, reason=? WHERE id=?", values)
        return count

    def count(self) -> int:
        """Photos that have captions."""
        where = "places JOIN photos USING (number) WHERE captions IS NOT NULL"
        (count,) = self._execute(f"SELECT COUNT(*) FROM {where}")[0]
        return int(count)

    def index(self, update: Callable[[sqlite3.Connection], None]) -> None:
        """Bring an index up to date in one transaction, unless it is."""
        if self._execute("SELECT 1 FROM settings WHERE name='indexed'"):
            return
        with self._transaction() as base:
            update(base)
            base.execute("INSERT INTO settings VALUES ('indexed', 'true')")

    def _in_order(self, columns: str, present: str) -> Iterator[Sequence[Any]]:
        place = -1
        while True:  # a page at a time, for a long reading would keep the write-ahead log from being emptied
            rows = self._execute(
                f"SELECT place, {columns} FROM places JOIN photos USING (number) "
                f"WHERE place > ? AND {present} IS NOT NULL ORDER BY place LIMIT 1000",
                [place],
            )
            if not rows:
                return
            for row in rows:
                yield row[1:]
            place = rows[-1][0]

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with _explained(self.path):
            return self._base.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _explained(self.path):
            self._base.execute("BEGIN")
            try:
                yield self._base
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise


@dataclass(frozen=True, slots=True)
class _Known:
    """A photo as the journal has it."""

    number: int
    id: str
    image: str
    size: int
    modified: int
    sha256: str | None
    captioned: int
    aligned: bool = field(kw_only=True)  # in its place already


@contextmanager
def _no_pool() -> Iterator[None]:
    yield None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what SQLite says into one line."""
    try:
        yield
    except sqlite3.Error as error:
        said = str(error)
        if "locked" in said:
            raise CaptionerError(
                f"{path}: another process is at work on this output; wait for it, or stop it"
            ) from None
        if "full" in said or "disk I/O" in said:
            raise CaptionerError(
                f"{path}: the disk is full or fails ({said}); make room and give the same command again: it goes on"
            ) from None
        if "malformed" in said or "not a database" in said:
            raise CaptionerError(f"{path}: is damaged ({said}); begin anew with --overwrite") from None
        raise CaptionerError(f"{path}: cannot be written ({said}); give another --output or --journal") from None
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be written ({error.strerror}); give another --output") from None


def is_journal(base: sqlite3.Connection) -> bool:
    """Whether a file is a journal of this project."""
    (application,) = base.execute("PRAGMA application_id").fetchone()
    return bool(application == _APPLICATION)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the settings in which two runs differ; a model may have another name."""
    if before.get("model") != now.get("model"):
        return f"another model ({before.get('name')}, not {now.get('name')})"
    if before.get("engine") != now.get("engine"):
        return f"another engine or precision ({before.get('engine')}, not {now.get('engine')})"
    old, new = before.get("options", {}), now.get("options", {})
    names = sorted(name for name in {**old, **new} if old.get(name) != new.get(name))
    said = ", ".join(f"{name} {old.get(name)}, not {new.get(name)}" for name in names)
    return f"other options ({said})" if said else ""


def _text(name: str) -> str | bytes:
    """A name as SQLite keeps it: one that is not UTF-8 as its bytes."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name)


def name_of(kept: str | bytes) -> str:
    """A name from SQLite; see `_text`."""
    return kept if isinstance(kept, str) else os.fsdecode(kept)

"""What the commands print and write: streams and files that are there whole or are not touched."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from captioner import files
from captioner.errors import CaptionerError


def writer(path: Path | None) -> AbstractContextManager[TextIO]:
    """Standard output, or a file that takes its name when it is complete; until then its rows are in FILE.part."""
    return _standard_output() if path is None or _is_standard_output(path) else _file(path)


@contextmanager
def _standard_output() -> Iterator[TextIO]:
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes; shown as they are if possible
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop()
        raise CaptionerError(f"standard output cannot be written ({error.strerror})") from None


@contextmanager
def _file(path: Path) -> Iterator[TextIO]:
    try:
        folder = path.is_dir() or not path.name
        special = path.exists() and not path.is_file()  # a device or a pipe, which must not be replaced
        path = path if special else path.resolve()
    except (OSError, RuntimeError):  # a name that is too long, or a link to itself
        raise CaptionerError(f"{path}: cannot be written; give another --output") from None
    if folder:
        raise CaptionerError(f"{path}: is a folder; give the name of a file")
    part = path if special else path.with_name(path.name + ".part")
    try:
        # Names of files may be any bytes. What an earlier, stopped run left is not overwritten.
        with part.open("w" if special else "x", encoding="utf-8", errors="surrogateescape") as out:
            try:
                yield out
                out.flush()
            finally:
                if not special and not part.stat().st_size:  # nothing to keep, and nothing to replace a result with
                    part.unlink()
        if not special and part.exists():
            part.replace(path)
    except FileExistsError:
        raise CaptionerError(
            f"{part}: is there, from a run that was stopped or still goes on; rename or delete it first"
        ) from None
    except OSError as error:
        kept = f"; what was written is in {part}" if not special and part.exists() else "; give another --output"
        raise CaptionerError(f"{path}: cannot be written ({error.strerror}){kept}") from None
    except KeyboardInterrupt:
        if not special and part.exists():
            print(f"what was captioned so far is in {part}", file=sys.stderr)
        raise


def _is_standard_output(path: Path) -> bool:
    """Whether a path is another name of it, such as `/dev/stdout`: what it leads to must not be replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def write(path: Path, text: str) -> None:
    """Write a result in one step."""
    try:
        if _is_standard_output(path) or (path.exists() and not path.is_file() and not path.is_dir()):
            with writer(path) as out:
                out.write(text)
        else:
            files.write(path.resolve(), text)
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be written ({error.strerror}); give another file") from None


def as_json(row: dict[str, object]) -> str:
    """A row as JSON; a name that is not UTF-8 is escaped, as `os.fsencode` understands it."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(row)


def one_line(text: object) -> str:
    """Text, such as a file's name, without what would begin a new line or command a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), str(text))


def drop() -> None:
    """Let what is still to be written to standard output vanish, so that nothing fails when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

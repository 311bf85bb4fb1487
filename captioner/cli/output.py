"""Output of the commands: standard streams, and files that are there whole or are not touched."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

from captioner import files
from captioner.errors import CaptionerError


def standard_streams() -> None:
    """Open standard streams that were closed onto nothing, so that no file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is the one that was closed
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # `print(file=None)` would print to standard output
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the process ends


def show_log(progress: bool) -> None:
    """Print the library's log on standard error: warnings, and how far the work is if asked for."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()])
    logging.getLogger("captioner").setLevel(logging.INFO if progress else logging.WARNING)


def say(message: object) -> None:
    """Print a line on standard error. Nothing that goes wrong there stops the work."""
    with contextlib.suppress(OSError, ValueError):
        print(one_line(message), file=sys.stderr, flush=True)


class _Lines(logging.Handler):
    """Log records as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        for line in self.format(record).splitlines():
            say(line)


def check_standard_output() -> None:
    """Refuse to compute captions that nobody will see.

    Raises:
        CaptionerError: standard output is closed.
    """
    if sys.stdout is None:
        raise CaptionerError("standard output is closed; open it, or give a file with --output")


def writer(path: Path | None) -> AbstractContextManager[TextIO]:
    """Standard output, or a file that takes its name when it is complete; until then its rows are in FILE.part."""
    return _standard_output() if path is None or _is_standard_output(path) else _file(path)


@contextmanager
def _standard_output() -> Iterator[TextIO]:
    check_standard_output()
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
    if not special:
        _check_replaceable(path)
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
            say(f"the rows so far are in {part}")
        raise


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file that its owner has made read-only, although its folder would allow it."""
    if path.is_file() and not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)):
        raise CaptionerError(f"{path}: is read-only; change its permissions, or give another file")


def is_special(path: Path) -> bool:
    """Whether a path is standard output, a device or a pipe, to which rows are written as they come."""
    try:
        return _is_standard_output(path) or (path.exists() and not path.is_file() and not path.is_dir())
    except OSError:
        return False


def _is_standard_output(path: Path) -> bool:
    """Whether a path is another name of standard output, such as `/dev/stdout`, whose target must not be replaced."""
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
            _check_replaceable(path)
            files.write(path.resolve(), text)
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be written ({error.strerror}); give another file") from None


def as_json(row: dict[str, object]) -> str:
    """A row as JSON; a name that is not UTF-8 is escaped, as `os.fsencode` understands it."""
    text = json.dumps(row, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(row)


def one_line(text: object) -> str:
    """Text, such as a file's name, without characters that begin a new line, command a terminal, or hide the rest.

    Bytes of names that are no text (lone surrogates) are kept: `_standard_output` writes them as they were.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else _escaped(c) for c in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def drop() -> None:
    """Let output that is not written yet vanish, so that nothing fails when the process ends."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # standard output is closed, or a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

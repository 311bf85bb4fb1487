"""Files that are there whole or not at all, and are known by their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

#: Models that come with this package.
PRETRAINED = Path(__file__).parent / "pretrained"

_DEEPEST = 64  # objects and lists within each other


def write(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file that is there whole or, if the process is killed, as it was before.

    Args:
        path: the file.
        content: text is encoded as UTF-8.
        durable: whether that also holds if the machine stops; false is faster for what can be made again.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    # The name is this process's own, so that two at once do no harm.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path, largest: int) -> Any:
    """Read a file of JSON that may come from a stranger.

    Args:
        path: a regular file.
        largest: size of the file, in bytes, beyond which it is not read.

    Raises:
        ValueError: it is larger, not UTF-8, not JSON, nested too deeply, or has a key twice; the message says which.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"more than {largest:,} bytes")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise ValueError("nested too deeply")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:60]!r} twice")
    return found

"""Files that are there whole or not at all, and are known by their content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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

import errno
import hashlib
import os

import pytest

from captioner import files


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write(path, "vorher: ä")
    assert path.read_bytes() == "vorher: ä".encode()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(path, "after")
    assert path.read_bytes() == "vorher: ä".encode()
    assert list(tmp_path.iterdir()) == [path]
    files.write(path, b"after", durable=False)
    assert path.read_bytes() == b"after"


def test_sha256(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()

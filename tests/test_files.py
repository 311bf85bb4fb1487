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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff", "can't decode byte"),
        (b'{"a": 1, "a": 2}', "the key 'a' twice"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "digits"),
        (b'"' + b"x" * 9000 + b'"', "more than 8,192 bytes"),
    ],
)
def test_json_of_a_stranger(tmp_path, content, said):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        files.read_json(tmp_path / "file", 200_000 if len(content) > 50_000 else 8192)


def test_json_is_read(tmp_path):
    (tmp_path / "file").write_text('{"a": [1, {"b": null}], "ü": 0.5}', encoding="utf-8")
    assert files.read_json(tmp_path / "file", 100) == {"a": [1, {"b": None}], "ü": 0.5}

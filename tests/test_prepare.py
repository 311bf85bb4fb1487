"""Fetching a data set from a server on this machine: fresh, resumed, damaged, refused, stopped, without room."""

import hashlib
import http.server
import importlib.util
import io
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from captioner.datasets.annotations import load

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:  # stored, so that a damaged byte is a damaged photo
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


PHOTOS = {f"Flicker8k_Dataset/{n}.jpg": bytes([n]) * 40_000 for n in range(6)}
PHOTOS_ZIP = zipped({**PHOTOS, "__MACOSX/Flicker8k_Dataset/._0.jpg": b"junk", "readme.txt": b"not wanted"})
TEXT_ZIP = zipped(
    {
        "Flickr8k.token.txt": "".join(f"{n}.jpg#{k}\tcaption {k} .\n" for n in range(6) for k in range(5)).encode(),
        "Flickr_8k.trainImages.txt": b"0.jpg\n1.jpg\n2.jpg\n3.jpg\n",
        "Flickr_8k.devImages.txt": b"4.jpg\n",
        "Flickr_8k.testImages.txt": b"5.jpg\n",
    }
)


@dataclass
class Server:
    """What the server holds, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # whether it can send a part of a file
    drop_after: int | None = None  # bytes after which it cuts every connection
    slow: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (name, Range)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(files={"Flickr8k_Dataset.zip": PHOTOS_ZIP, "Flickr8k_text.zip": TEXT_ZIP})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, asked = self.path.strip("/"), self.headers.get("Range")
            state.asked.append((name, asked))
            content = state.files.get(name)
            if content is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.ranges else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            body = content[start:]
            if state.drop_after is not None:
                body = body[: state.drop_after]
            for at in range(0, len(body), 20_000):
                try:
                    self.wfile.write(body[at : at + 20_000])
                except OSError:  # the client was stopped
                    return
                time.sleep(0.05 if state.slow else 0)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


@dataclass
class Outcome:
    status: int
    out: str
    error: str


@dataclass
class Command:
    """Runs `prepare.py flickr8k` as the command line does, on a data set of six photos."""

    module: ModuleType
    capsys: pytest.CaptureFixture[str]
    folder: Path
    url: str

    def __call__(self, *options: str, mirror: str | None = None) -> Outcome:
        self.capsys.readouterr()
        arguments = ["flickr8k", "--folder", str(self.folder), "--mirror", mirror or self.url, *options]
        status = self.module.main(arguments)
        out, error = self.capsys.readouterr()
        assert len(error.splitlines()) == (1 if status else 0)  # one clear line, and only if something is wrong
        return Outcome(status, out, error)

    def is_complete(self) -> bool:
        photos = {path.name: path.read_bytes() for path in (self.folder / "Flicker8k_Dataset").iterdir()}
        return (
            photos == {Path(name).name: data for name, data in PHOTOS.items()} and len(load(self.folder).examples) == 6
        )


def small(module: ModuleType, **checksums: str) -> Any:
    """The real description of Flickr8k, with the counts of the small one."""
    text, photos = module.DATA_SETS["flickr8k"].archives
    photos = replace(photos, contents=(("Flicker8k_Dataset/*.jpg", 6),), **checksums)
    return replace(module.DATA_SETS["flickr8k"], archives=(text, photos), photos={"train": 4, "val": 1, "test": 1})


@pytest.fixture
def command(
    module: ModuleType,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "DATA_SETS", {"flickr8k": small(module)})
    return Command(module, capsys, tmp_path / "flickr8k", server.url)


def test_fresh_then_again(command: Command, server: Server) -> None:
    done = command()
    assert done.status == 0
    assert command.is_complete()
    assert [line.split() for line in done.out.splitlines()[-5:]] == [
        ["split", "photos", "captions"],
        ["train", "4", "20"],
        ["val", "1", "5"],
        ["test", "1", "5"],
        ["total", "6", "30"],
    ]
    assert {path.name for path in command.folder.iterdir()} == {
        "Flicker8k_Dataset",
        "Flickr8k.token.txt",
        "Flickr_8k.trainImages.txt",
        "Flickr_8k.devImages.txt",
        "Flickr_8k.testImages.txt",
    }
    server.asked.clear()
    again = command()
    assert (again.status, server.asked) == (0, [])
    assert again.out.splitlines()[-5:] == done.out.splitlines()[-5:]


def test_archives_can_be_kept(command: Command) -> None:
    assert command("--keep").status == 0
    assert (command.folder / "Flickr8k_Dataset.zip").read_bytes() == PHOTOS_ZIP


def test_goes_on_where_it_ended(command: Command, server: Server) -> None:
    command.folder.mkdir()
    (command.folder / "Flickr8k_Dataset.zip.part").write_bytes(PHOTOS_ZIP[:100_000])
    assert command().status == 0
    assert ("Flickr8k_Dataset.zip", "bytes=100000-") in server.asked
    assert command.is_complete()


def test_a_part_that_is_whole_or_too_long(command: Command, server: Server) -> None:
    command.folder.mkdir()
    part = command.folder / "Flickr8k_Dataset.zip.part"
    part.write_bytes(PHOTOS_ZIP)
    assert command().status == 0
    assert command.is_complete()
    (command.folder / "Flicker8k_Dataset/0.jpg").unlink()
    part.write_bytes(PHOTOS_ZIP + b"more")
    assert command().status == 0
    assert command.is_complete()


def test_a_line_that_drops_again_and_again(command: Command, server: Server) -> None:
    server.drop_after = 30_000
    assert command().status == 0
    assert command.is_complete()
    assert len(server.asked) > 8


def test_a_line_that_brings_nothing(command: Command, server: Server) -> None:
    server.drop_after = 0
    done = command()
    assert done.status == 2
    assert "the download stopped (it ended after 0 of" in done.error
    assert "run again to go on" in done.error


def test_a_server_that_cannot_resume(command: Command, server: Server) -> None:
    server.ranges = False
    command.folder.mkdir()
    (command.folder / "Flickr8k_Dataset.zip.part").write_bytes(b"something else" * 1000)
    done = command()
    assert done.status == 0
    assert "cannot go on where a download ended; starting again" in done.out
    assert command.is_complete()


def test_no_network(command: Command, server: Server) -> None:
    done = command(mirror="http://127.0.0.1:9")
    assert done.status == 2
    assert "Flickr8k_text.zip: cannot be reached ([Errno" in done.error
    assert f"put Flickr8k_text.zip into {command.folder} by hand and run again (see data/README.md)" in done.error
    assert "cannot be reached (unknown url type" in command(mirror="nowhere").error
    assert server.asked == []


def test_not_found(command: Command, server: Server) -> None:
    del server.files["Flickr8k_text.zip"]
    assert "Flickr8k_text.zip: the server answers 404 Not Found; put Flickr8k_text.zip" in command().error


def test_archives_put_there_by_hand(command: Command) -> None:
    command.folder.mkdir()
    (command.folder / "Flickr8k_Dataset.zip").write_bytes(PHOTOS_ZIP)
    (command.folder / "Flickr8k_text.zip").write_bytes(TEXT_ZIP)
    assert command(mirror="http://127.0.0.1:9").status == 0
    assert command.is_complete()


def test_a_folder_made_by_hand(command: Command) -> None:
    (command.folder / "images").mkdir(parents=True)  # not the names of the archives, but names that can be loaded
    for name, data in PHOTOS.items():
        (command.folder / "images" / Path(name).name).write_bytes(data)
    with zipfile.ZipFile(io.BytesIO(TEXT_ZIP)) as text:
        text.extractall(command.folder / "Flickr8k_text")
    done = command(mirror="http://127.0.0.1:9")
    assert done.status == 0
    assert done.out.splitlines()[-1].split() == ["total", "6", "30"]
    # One photo short: without a network it says which; with --check the network is not even tried.
    (command.folder / "images/5.jpg").unlink()
    for options, mirror in (((), "http://127.0.0.1:9"), (("--check",), None)):
        short = command(*options, mirror=mirror)
        assert short.status == 2
        assert "missing photos: 1 (e.g. 5.jpg; looked in " in short.error
    # Half a data set that is consistent is used, and said to be half.
    (command.folder / "Flickr8k_text/Flickr_8k.testImages.txt").unlink()
    half = command(mirror="http://127.0.0.1:9")
    assert half.status == 0
    assert "note: these are not the published numbers of photos (train 4, val 1, test 1)" in half.out


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_wrong_checksum(command: Command, server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    right = f"{kind}:{hashlib.new(kind, PHOTOS_ZIP).hexdigest()}"
    monkeypatch.setitem(command.module.DATA_SETS, "flickr8k", small(command.module, checksum=right))
    server.files["Flickr8k_Dataset.zip"] = damaged = PHOTOS_ZIP.replace(b"\x03\x03", b"\x03\x04", 1)
    done = command()
    assert done.status == 2
    assert f"its {kind} is {hashlib.new(kind, damaged).hexdigest()}, expected {right[len(kind) + 1 :]}" in done.error
    assert "set aside as Flickr8k_Dataset.zip.bad, run again to download it afresh" in done.error
    assert (command.folder / "Flickr8k_Dataset.zip.bad").read_bytes() == damaged
    assert not (command.folder / "Flicker8k_Dataset").exists()
    server.files["Flickr8k_Dataset.zip"] = PHOTOS_ZIP
    assert command().status == 0
    assert command.is_complete()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PHOTOS_ZIP.replace(b"\x03\x03", b"\x03\x04", 1), "it is damaged (Bad CRC-32 for file"),
        (PHOTOS_ZIP[:-100], "it is not a whole zip file"),
        (b"<html>log in first</html>", "it is not a whole zip file"),
        (zipped(dict(list(PHOTOS.items())[:4])), "it holds 4 of Flicker8k_Dataset/*.jpg, expected 6"),
        (
            zipped({**dict(list(PHOTOS.items())[:5]), "Flicker8k_Dataset/../../x.jpg": b"x"}),
            "it holds 'Flicker8k_Dataset/../../x.jpg', which points out of the folder",
        ),
    ],
)
def test_damaged_without_a_checksum(command: Command, server: Server, content: bytes, expected: str) -> None:
    server.files["Flickr8k_Dataset.zip"] = content
    done = command()
    assert done.status == 2
    assert expected in done.error
    assert (command.folder / "Flickr8k_Dataset.zip.bad").read_bytes() == content
    assert not list(command.folder.parent.glob("*.jpg"))
    server.files["Flickr8k_Dataset.zip"] = PHOTOS_ZIP
    assert command().status == 0
    assert command.is_complete()


def test_another_file_than_expected(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.module.DATA_SETS, "flickr8k", small(command.module, size=5))
    assert f"has {len(PHOTOS_ZIP):,} bytes, expected 5; it has changed" in command().error


def test_an_archive_with_all_in_one_folder(command: Command, server: Server) -> None:
    server.files["Flickr8k_Dataset.zip"] = zipped({f"Flickr8k/{name}": data for name, data in PHOTOS.items()})
    assert command().status == 0
    assert command.is_complete()


DRIVER = """
import importlib.util, resource, signal, sys
from dataclasses import replace
spec = importlib.util.spec_from_file_location("prepare", {script!r})
prepare = sys.modules["prepare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
prepare.CHUNK = 20_000
text, photos = prepare.DATA_SETS["flickr8k"].archives
photos = replace(photos, contents=(("Flicker8k_Dataset/*.jpg", 6),))
counts = {{"train": 4, "val": 1, "test": 1}}
prepare.DATA_SETS["flickr8k"] = replace(prepare.DATA_SETS["flickr8k"], archives=(text, photos), photos=counts)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(prepare.main(["flickr8k", "--folder", {folder!r}, "--mirror", {url!r}]))
"""


def driver(command: Command, limit: int = 0) -> list[str]:
    values = {"script": str(SCRIPT), "folder": str(command.folder), "url": command.url, "limit": limit}
    return [sys.executable, "-c", DRIVER.format(**values)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_run_again(command: Command, server: Server, how: signal.Signals) -> None:
    server.slow = True
    part = command.folder / "Flickr8k_Dataset.zip.part"
    with subprocess.Popen(driver(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 20
        while not (part.exists() and part.stat().st_size > 40_000):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(how)
        _, error = running.communicate()
    if how == signal.SIGINT:
        assert (running.returncode, error) == (130, "stopped; run again to go on\n")
    assert 40_000 < part.stat().st_size < len(PHOTOS_ZIP)
    server.asked.clear()
    assert command().status == 0
    assert [name for name, _ in server.asked] == ["Flickr8k_Dataset.zip"]  # what was complete is not fetched again
    assert server.asked[0][1] is not None
    assert command.is_complete()


def test_stopped_while_unpacking(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def stop(source: Any, file: Any, size: int) -> None:
        copied.append(source.name)
        file.write(source.read(10))
        if len(copied) == 7:  # the four text files, two photos, and a piece of the third
            raise KeyboardInterrupt
        file.write(source.read())

    with monkeypatch.context() as patch:
        patch.setattr(command.module.shutil, "copyfileobj", stop)
        assert command().status == 130
    assert len(list((command.folder / "Flicker8k_Dataset").iterdir())) == 2
    again = command(mirror="http://127.0.0.1:9")  # the archive is there: no network is needed
    assert again.status == 0
    assert "unpacking 4 of 6 files" in again.out
    assert command.is_complete()


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on the size of files on this system")
def test_disk_full(command: Command, server: Server) -> None:
    done = subprocess.run(driver(command, limit=100_000), capture_output=True, text=True)
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    assert "free space and run again, it goes on" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert 0 < (command.folder / "Flickr8k_Dataset.zip.part").stat().st_size <= 100_000
    server.asked.clear()
    assert command().status == 0
    assert server.asked[0][1] is not None  # it went on from what was kept
    assert command.is_complete()


def test_too_little_room_is_seen_before(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = command.module.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(command.module.shutil, "disk_usage", lambda path: usage)
    done = command()
    assert done.status == 2
    assert "the disk is full (" in done.error
    assert "bytes are needed and 1,000 are free" in done.error


def test_a_folder_that_cannot_be_made(command: Command, tmp_path: Path) -> None:
    command.folder = tmp_path / "file" / "flickr8k"
    (tmp_path / "file").touch()
    done = command()
    assert done.status == 2
    assert "cannot be written" in done.error


def test_the_descriptions_of_the_real_data_sets(module: ModuleType) -> None:
    assert set(module.DATA_SETS) == {"coco", "coco2017", "flickr8k"}
    for data_set in module.DATA_SETS.values():
        assert data_set.folder.relative_to(SCRIPT.parent).parts[0] in ("coco", "flickr8k")  # which git ignores
        for archive in data_set.archives:
            assert archive.name.endswith(".zip")
            assert all(count > 0 for _, count in archive.contents)
            if archive.checksum:
                kind, _, digest = archive.checksum.partition(":")
                assert len(bytes.fromhex(digest)) == hashlib.new(kind).digest_size
    photos = {a.name: n for d in module.DATA_SETS.values() for a in d.archives for p, n in a.contents if "*" in p}
    assert photos["train2014.zip"] + photos["val2014.zip"] == photos["train2017.zip"] + photos["val2017.zip"] == 123_287
    assert sum(module.DATA_SETS["coco"].photos.values()) == 123_287


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="needs ../shared")
def test_verifying_a_real_folder(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["flickr8k", "--folder", str(SHARED / "flickr8k"), "--check"]) == 0
    out = capsys.readouterr().out
    assert ["train", "6,000", "30,000"] in [line.split() for line in out.splitlines()]
    assert "these are not the published numbers" in out  # it has no test split
    assert module.main(["coco", "--year", "2017", "--folder", str(SHARED / "coco"), "--check"]) == 2
    assert "missing photos: 4,890" in capsys.readouterr().err

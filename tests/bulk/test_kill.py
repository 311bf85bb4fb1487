"""A run that is killed at any moment and given again ends as one that nobody disturbed."""

import os
import random
import signal
import sqlite3
import tarfile
import time
import traceback
from pathlib import Path

import pytest
from fake import Fake, photo, provenance

from captioner.bulk import pipeline, run, writers
from captioner.bulk.index import search
from captioner.bulk.job import Job

FORMATS = {
    "jsonl": "out.jsonl",
    "csv": "out.csv",
    "parquet": "out.parquet",
    "coco": "out.json",
    "webdataset": "out.tar",
    "webdataset of shards": "out-%02d.tar",
    "sqlite": "out.db",
    "txt": None,
    "xmp": None,
}
KILLS = 20  # a format; with KILLS=200 in the environment, more


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Thirty photos, of which three cannot be read."""
    folder = tmp_path_factory.mktemp("kill") / "album"
    for number in range(30):
        path = photo(folder / f"{number // 10}" / f"{number:03}.bmp", number)
        if number in (0, 17, 29):
            path.write_bytes(b"no photo")
    return folder


def packed(album, folder):
    """The same photos in shards, one of which is compressed."""
    paths = sorted(album.rglob("*.bmp"))
    for name, mode, some in (("0.tar.gz", "w:gz", paths[:20]), ("1.tar", "w", paths[20:])):
        with tarfile.open(folder / name, mode) as tar:
            for path in some:
                tar.add(path, path.name)
    return str(folder / "0.tar.gz"), str(folder / "1.tar")


def start(job):
    """Run a job in a process of its own, which is quickly made by forking this one."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        status = run.run(job, Fake(delay=0.0003), provenance(num_captions=2)).status
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def result(job, folder):
    """All that a run has written, in a form that can be compared."""
    if job.format in ("txt", "xmp"):
        return {path.name: path.read_bytes() for path in sorted(folder.rglob(f"*.{job.format}"))}
    if job.format == "sqlite":
        base = sqlite3.connect(job.output)
        columns = "image, size, captions, kind, reason"
        rows = base.execute(f"SELECT {columns} FROM places JOIN photos USING (number) ORDER BY place").fetchall()
        base.close()
        found = [hit.image for hit in search(job.output, "blue", 100)]
        return rows, sorted(found)
    if job.format == "webdataset":
        return {path.name: path.read_bytes() for path in job.output.parent.glob("out*.tar")}
    return job.output.read_bytes()


def contents(shards):
    """The photos in shards, in their order."""
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.name.endswith(".bmp")]
    return found


def clean(job, folder, home):
    for path in [*folder.rglob("*.txt"), *folder.rglob("*.xmp"), *folder.glob(".captioner*"), *home.glob("out*")]:
        path.unlink()


@pytest.mark.parametrize("format_", FORMATS)
def test_killed_at_random_moments(album, tmp_path, monkeypatch, format_):
    if format_ == "parquet":
        pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(pipeline, "CHUNK", 3)
    monkeypatch.setattr(run, "_COMMIT_ROWS", 4)
    monkeypatch.setattr(writers, "_SHARD", 10)
    output = FORMATS[format_] and tmp_path / FORMATS[format_]
    photos = packed(album, tmp_path) if format_ == "webdataset of shards" else (str(album),)
    job = Job(photos=photos, output=output, format=format_.partition(" ")[0], quiet=True, workers=2)
    clean(job, album, tmp_path)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1]) == 1
    lasts = time.monotonic() - began
    expected = result(job, album)
    failures = next(path for place in (tmp_path, album) for path in place.glob("*.failures.jsonl")).read_bytes()
    assert failures.count(b"\n") == 3
    if job.format == "webdataset":
        good = [path.read_bytes() for path in sorted(album.rglob("*.bmp")) if path.stat().st_size > 10]
        assert contents(sorted(tmp_path.glob("out*.tar"))) == good
    moments = random.Random(format_)
    resumed = 0
    for _ in range(int(os.environ.get("KILLS", KILLS))):
        clean(job, album, tmp_path)
        for _ in range(moments.choice([1, 1, 3])):  # some are killed again while they go on
            child = start(job)
            time.sleep(moments.uniform(0, lasts))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        journal = job.journal_path()
        resumed += journal.exists() and journal.stat().st_size > 0
        status = os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1])
        assert status == 1
        assert result(job, album) == expected
        left = [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]
        assert left == []
    assert resumed >= KILLS // 2
    clean(job, album, tmp_path)
    assert isinstance(expected, bytes | dict | tuple)
    assert Path(album).is_dir()

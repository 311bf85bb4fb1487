"""The same job on a local cluster of two workers, one of which is killed in the middle. Run where Ray is installed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fake import Fake, caption, photo, provenance

from captioner.bulk import run
from captioner.bulk.job import Job

ray = pytest.importorskip("ray", reason="needs the extra [ray]")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bulk")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield
    ray.shutdown()


def load(marks=None):
    """Load the fake model, and leave the number of the process in a folder."""
    if marks:
        (Path(marks) / str(os.getpid())).touch()
    return Fake(delay=0.005)


def caption_all(album, output, marks=None, **settings):
    import functools

    job = Job(photos=(str(album),), output=output, ray="local", workers=2, quiet=True, **settings)
    return run.run(job, functools.partial(load, marks), provenance())


def expected(album, count, bad=()):
    return [
        {"image": str(album / f"{n:04}.png"), "caption": caption(n, 0, 7).text} for n in range(count) if n not in bad
    ]


def rows(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_worker_costs_time_and_no_photo(cluster, tmp_path):
    album, marks, output = tmp_path / "album", tmp_path / "marks", tmp_path / "out.jsonl"
    marks.mkdir()
    for number in range(600):
        photo(album / f"{number:04}.png", number % 256)
    (album / "0100.png").write_bytes(b"no photo")
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for mark in marks.iterdir():
                time.sleep(0.7)
                os.kill(int(mark.name), signal.SIGKILL)
                killed.append(mark.name)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    report = caption_all(album, output, str(marks))
    thread.join()
    assert killed
    assert len(list(marks.iterdir())) >= 3  # two workers, and one in the place of the killed one
    assert (report.status, report.captioned, report.failed) == (1, 599, 1)
    found = rows(output)
    assert [row["image"] for row in found] == [row["image"] for row in expected(album, 600, bad=(100,))]
    assert found[3] == expected(album, 4)[3]
    (failure,) = rows(report.failures)
    assert failure["class"] == "not a photo"
    again = caption_all(album, output)
    assert (again.captioned, again.counts.known) == (0, 599)


@pytest.mark.slow
def test_photos_at_an_address(cluster, tmp_path):
    album, output = tmp_path / "album", tmp_path / "out.jsonl"
    for number in range(20):
        photo(album / f"{number:04}.png", number)
    job = Job(photos=(f"file://{album}",), output=output, ray="local", workers=2, quiet=True)
    report = run.run(job, load, provenance())
    assert (report.status, report.captioned) == (0, 20)
    assert [row["caption"] for row in rows(output)] == [row["caption"] for row in expected(album, 20)]
    assert rows(output)[0]["image"] == f"file://{album}/0000.png"
    here = tmp_path / "here.jsonl"
    run.run(Job(photos=(f"file://{album}",), output=here, quiet=True), Fake(), provenance())
    assert here.read_bytes() == output.read_bytes()  # the same without a cluster

"""A bulk run from start to end: what it does again, what it leaves, what it says, and how it stops."""

import dataclasses
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from fake import Fake, caption, photo, provenance

from captioner import images
from captioner.bulk import journal, pipeline, run, writers
from captioner.bulk.job import Job
from captioner.errors import CaptionerError


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    for number in range(12):
        photo(folder / f"{number:02}.png", number)
    return folder


class Counting(Fake):
    """Counts the photos that it looks at."""

    seen = 0

    def features(self, photos):
        self.seen += len(photos)
        return super().features(photos)


def caption_all(album, output, model=None, options=None, **settings):
    model = model or Counting()
    job = Job(photos=(str(album),), output=output, quiet=True, **settings)
    report = run.run(job, model, options or provenance())
    return report, getattr(model, "seen", 0), rows(output)


def rows(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def expected(album, *numbers):
    return [{"image": str(album / f"{n:02}.png"), "caption": caption(n, 0, 7).text} for n in numbers]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def test_a_run_and_the_same_again(album, output):
    report, seen, written = caption_all(album, output)
    assert (report.status, report.captioned, seen) == (0, 12, 12)
    assert written == expected(album, *range(12))
    before = output.read_bytes()
    report, seen, _ = caption_all(album, output)
    assert (report.status, report.captioned, report.counts.known, seen) == (0, 0, 12, 0)
    assert output.read_bytes() == before
    assert run.summary(report) == "0 photos captioned, 12 done before"
    assert sum(report.shares.values()) == pytest.approx(1)


def test_new_changed_and_removed_photos(album, output):
    caption_all(album, output)
    photo(album / "03a.png", 100)
    (album / "05.png").unlink()
    photo(album / "07.png", 200)
    os.utime(album / "07.png", ns=(1, 1))
    report, seen, written = caption_all(album, output)
    assert seen == 2
    assert (report.counts.changed, report.counts.removed, report.counts.known) == (1, 1, 10)
    texts = [row["caption"] for row in written]
    numbers = [0, 1, 2, 3, 100, 4, 6, 200, 8, 9, 10, 11]
    assert texts == [caption(n, 0, 7).text for n in numbers]
    assert f"1 no longer there (e.g. {album}/05.png)" in run.summary(report)
    photo(album / "05.png", 5)  # it comes back as another file, in the place that it had
    _, seen, written = caption_all(album, output)
    assert seen == 1
    assert len(written) == 13
    assert written[6] == expected(album, 5)[0]


def test_photos_that_come_back_unchanged_are_not_done_again(album, output):
    caption_all(album, output)
    away = album.parent / "away"
    album.rename(away)
    album.mkdir()
    (away / "11.png").rename(album / "11.png")
    assert caption_all(album, output)[1:] == (0, expected(album, 11))
    for path in away.iterdir():
        path.rename(album / path.name)
    assert caption_all(album, output)[1:] == (0, expected(album, *range(12)))


def test_changes_are_told_by_content_if_asked(album, output):
    caption_all(album, output, by_content=True)
    for path in album.iterdir():
        os.utime(path, ns=(5, 5))  # touched
    (album / "03.png").rename(album / "99.png")  # renamed
    status = (album / "04.png").stat()
    photo(album / "04.png", 9)  # changed under the same size and time
    assert (album / "04.png").stat().st_size == status.st_size
    os.utime(album / "04.png", ns=(5, 5))
    report, seen, written = caption_all(album, output, by_content=True)
    assert seen == 1
    assert (report.counts.renamed, report.counts.changed) == (1, 1)
    assert [row["caption"] for row in written] == [
        caption(n, 0, 7).text for n in (0, 1, 2, 9, 5, 6, 7, 8, 9, 10, 11, 3)
    ]


def test_an_order_that_changes(album, output, tmp_path):
    listed = tmp_path / "list"
    names = [str(album / f"{n:02}.png") for n in range(12)]

    def again(*order):
        listed.write_text("\n".join(names[n] for n in order))
        model = Counting()
        report = run.run(Job(list=str(listed), output=output, quiet=True), model, provenance())
        return report, model.seen, [Path(row["image"]).stem for row in rows(output)]

    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 5, 0), (1, 0, 5), (1, 1, 0, 1, 5, 5)):
        before = {f"{n:02}" for n in order}
        _, seen, found = again(*order)
        assert found == list(dict.fromkeys(f"{n:02}" for n in order))
        assert seen == (len(order) if order[0] == 0 else 1 if order == (1, 5, 0) else 0)
        assert set(found) == before
    assert again(1, 1, 0, 1, 5, 5)[0].counts.twice == 3


def test_failures_are_listed_and_tried_again_when_asked(album, output):
    bad = album / "02.png"
    bad.write_bytes(b"no photo")
    time_ = bad.stat().st_mtime_ns
    report, _, written = caption_all(album, output)
    assert report.status == 1
    assert len(written) == 11
    (failure,) = rows(report.failures)
    assert failure["image"] == str(bad)
    assert failure["class"] == "not a photo"
    assert failure["reason"].startswith(f"{bad}: not a photo; expected JPEG")
    report, seen, _ = caption_all(album, output)
    assert (report.status, report.counts.failed, seen) == (1, 1, 0)
    assert "1 failed before (try them again with --retry-failed)" in run.summary(report)
    content = photo(album.parent / "good.png", 2).read_bytes()
    bad.write_bytes(content)
    os.utime(bad, ns=(time_, time_))
    report, seen, written = caption_all(album, output, retry_failed=True)
    assert (report.status, seen) == (0, 1)
    assert written == expected(album, *range(12))
    assert report.failures is None
    assert not list(output.parent.glob("*.failures.jsonl"))


def test_another_model_or_other_options_are_refused(album, output):
    caption_all(album, output)
    before = output.read_bytes()
    with pytest.raises(CaptionerError, match=r"journal: was made with another model \(fake, not fake\); give the same"):
        caption_all(album, output, options=provenance(model="other"))
    with pytest.raises(CaptionerError, match=r"was made with other options \(beam_size 3, not 5\); give the same, or"):
        caption_all(album, output, options=provenance(beam_size=5))
    precise = dataclasses.replace(provenance(), engine="torch, float32")
    with pytest.raises(CaptionerError, match=r"was made with another engine or precision \(fake, not torch, float32\)"):
        caption_all(album, output, options=precise)
    assert output.read_bytes() == before
    assert caption_all(album, output, options=dataclasses.replace(provenance(), name="the same, elsewhere"))[1] == 0
    _, seen, _ = caption_all(album, output, options=provenance(beam_size=5), overwrite=True)
    assert seen == 12


@pytest.mark.parametrize("content", [b"text", b"SQLite format 3\0" + bytes(100), bytes(5000)])
def test_files_of_others_are_not_touched(album, output, content):
    output.write_bytes(content)
    with pytest.raises(CaptionerError, match="is there, and no journal says what is in it; give another --output, or"):
        caption_all(album, output)
    other = output.with_name("out.db")
    other.write_bytes(content)
    with pytest.raises(CaptionerError, match=r"out\.db: (is there and is no journal|cannot be written|is damaged)"):
        run.run(Job(photos=(str(album),), output=other, quiet=True), Fake(), provenance())
    assert output.read_bytes() == other.read_bytes() == content


def test_databases_of_others_are_not_touched(album, tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE mine (x)")
    base.close()
    before = other.read_bytes()
    with pytest.raises(CaptionerError, match=r"other\.db: is there and is no journal"):
        run.run(Job(photos=(str(album),), output=other, overwrite=True, quiet=True), Fake(), provenance())
    assert other.read_bytes() == before


def test_a_second_process_is_refused(album, output):
    job = Job(photos=(str(album),), output=output, quiet=True)
    with journal.Journal(job.journal_path(), provenance().as_json()):
        code = (
            "import sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path; from fake import *;"
            "from captioner.bulk import run; from captioner.bulk.job import Job;"
            "run.run(Job(photos=(sys.argv[3],), output=Path(sys.argv[4])), Fake(), provenance())"
        )
        here = Path(__file__).parent
        done = subprocess.run(
            [sys.executable, "-c", code, here, here.parents[1], album, output], capture_output=True, text=True
        )
    said = done.stderr.splitlines()[-1]
    assert "out.jsonl.journal: another process is at work on this output; wait for it, or stop it" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_photos_in_hand(album, output, monkeypatch, number):
    monkeypatch.setattr(pipeline, "CHUNK", 1)
    thread = threading.Timer(0.15, os.kill, (os.getpid(), number))
    thread.start()
    job = Job(photos=(str(album),), output=output, quiet=True, workers=1)
    report = run.run(job, Fake(delay=0.05), provenance())
    assert report.interrupted == number
    assert report.status == 128 + number
    assert 0 < report.captioned < 12
    assert report.total == report.captioned
    assert not output.exists()
    said = f"stopped; {report.captioned} photos have captions; the same command goes on, and writes {output} when all"
    assert next(run.advice(report)) == f"{said} are done"
    later, seen, written = caption_all(album, output)
    assert later.status == 0
    assert seen == 12 - report.captioned
    assert written == expected(album, *range(12))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_one_line_and_the_output_stays(album, output, monkeypatch):
    caption_all(album, output)
    before = output.read_bytes()
    photo(album / "20.png", 20)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writers.os, "fsync", full)
    with pytest.raises(CaptionerError, match=r"cannot be written \(No space left on device\); the captions are kept"):
        caption_all(album, output)
    assert output.read_bytes() == before
    assert not list(output.parent.glob("*.part"))
    monkeypatch.undo()
    _, seen, written = caption_all(album, output)
    assert seen == 0
    assert len(written) == 13


def test_a_journal_on_a_full_disk(album, output):
    """SQLite is told that the file may not grow, which it says as it does of a full disk."""
    job = Job(photos=(str(album),), output=output, quiet=True)
    with journal.Journal(job.journal_path(), provenance().as_json()) as full:
        full._base.execute("PRAGMA max_page_count=9")
        items = list(full.todo(run.sources.find(job), retry_failed=False, by_content=False))
        many = [journal.Found("words " * 999, 0.0, 0.0)]
        with pytest.raises(CaptionerError, match=r"the disk is full or fails .+; make room and give the same command"):
            full.record([(each, many, None, "") for each in items])
    _, seen, written = caption_all(album, output)
    assert seen == 12
    assert written == expected(album, *range(12))


def test_an_error_of_the_source_loses_nothing(album, output, tmp_path):
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"no Parquet")
    pytest.importorskip("pyarrow")
    job = Job(photos=(str(album), str(bad)), output=output, quiet=True)
    with pytest.raises(CaptionerError, match=r"bad\.parquet: is no Parquet file"):
        run.run(job, Fake(), provenance())
    assert caption_all(album, output)[1] == 0


def test_a_data_set_of_folders_shards_and_parquet(album, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = sorted(album.iterdir())
    with tarfile.open(tmp_path / "00.tar.gz", "w:gz") as tar:
        for path in paths[4:8]:
            tar.add(path, f"x/{path.name}")
    parquet.write_table(pa.table({"image": [path.read_bytes() for path in paths[8:]]}), tmp_path / "a.parquet")
    for path in paths[4:]:
        path.unlink()
    (album / "01.png").write_bytes(b"no photo")
    output = tmp_path / "out.tar"
    photos = (str(album), str(tmp_path / "a.parquet"), str(tmp_path / "00.tar.gz"))
    job = Job(photos=photos, output=output, quiet=True, workers=1)

    class Rash(Fake):
        """Does away with a photo that has been read."""

        def describe(self, features, options=None):
            (album / "03.png").unlink(missing_ok=True)
            return super().describe(features, options)

    report = run.run(job, Rash(), provenance())
    assert report.failed == 2
    assert [row["class"] for row in rows(report.failures)] == ["not a photo", "missing"]
    with tarfile.open(output) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    keys = [*(f"{n:09}" for n in (0, 1, 3, 4, 5, 6)), *(f"x/{n:02}" for n in range(4, 8))]
    assert list(found) == [f"{key}.{ending}" for key in keys for ending in ("png", "json", "txt")]
    for key in keys:
        colour = images.load(found[f"{key}.png"], 1)[:, 0, 0]
        assert found[f"{key}.txt"].decode() == caption(*colour).text


def test_details(album, output):
    _, _, written = caption_all(album, output, details=True, options=provenance(num_captions=2))
    row = written[3]
    assert row["image"].endswith("03.png")
    assert [each["caption"] for each in row["captions"]] == [caption(3, 0, 7, rank).text for rank in range(2)]
    assert (row["logprob"], row["model"], row["name"], row["options"]["num_captions"]) == (-1.5, "m", "fake", 2)
    assert row["bytes"] == (album / "03.png").stat().st_size
    assert len(row["sha256"]) == 64
    assert row["time"].endswith("+00:00")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"output": Path("out.xyz")}, r"out\.xyz: its ending says no format; expected \.jsonl"),
        ({}, "there is nowhere to write to; give --output FILE, or --format txt or xmp for sidecars"),
        ({"photos": ("a.tar",), "format": "txt"}, "photos in a shard have no place; give --output FILE"),
        ({"photos": ("photo.png",), "format": "xmp"}, "the journal has no place; give --journal FILE, or a folder"),
        ({"output": Path()}, "is a folder; give the name of a file"),
        ({"output": Path("album"), "format": "csv"}, "is a folder; give the name of a file"),
        ({"output": Path("a.csv"), "captions_only": True}, "--captions-only has no meaning for csv, which never holds"),
        ({"output": Path("out-%02d.tar")}, r"out-00\.tar: is there, and no journal says what is in it"),
        ({"output": Path("b.tar"), "photos": ("a.tar", "album/../a.tar.gz")}, "a: is the name of two shards"),
        ({"output": Path("album/00.png"), "format": "csv", "overwrite": True}, "is one of the photos"),
    ],
)
def test_jobs_that_are_not_possible(album, monkeypatch, settings, said):
    monkeypatch.chdir(album.parent)
    for name in ("a.tar", "a.tar.gz", "out-00.tar"):
        Path(name).touch()
    photo("photo.png")
    if "photos" not in settings:
        settings = {"photos": ("album/00.png",), **settings}
    with pytest.raises(CaptionerError, match=said):
        run.check(Job(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"timeout": 0}, "timeout is 0; expected seconds"),
        ({"workers": -1}, "workers is -1"),
        ({"overwrite": True, "skip_existing": True}, "contradict each other"),
        ({"format": "txt", "output": Path("x")}, "leave out --output"),
        ({"format": "nothing"}, "format is 'nothing'; expected one of jsonl"),
        ({"skip_existing": True, "output": Path("x.csv")}, "is for sidecars"),
    ],
)
def test_settings_that_cannot_be_meant(settings, said):
    with pytest.raises(CaptionerError, match=said):
        Job(**settings)


def test_the_hash_of_a_model_is_of_what_captions_depend_on(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    before = run.model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("y")
    assert run.model_sha256(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert run.model_sha256(tmp_path) != before


def test_progress_counts_what_is_done(album, output, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, title, *arguments, **options):
            self.title = title

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set(self, done, total, note=""):
            shown.append((self.title, done, total, note))

    monkeypatch.setattr(run, "Progress", Bar)
    monkeypatch.setattr(run, "_COMMIT_ROWS", 3)
    (album / "00.png").write_bytes(b"")
    job = Job(photos=(str(album),), output=output)
    time.sleep(0.01)
    run.run(job, Fake(delay=0.005), provenance())
    captioned = [done for title, done, _, _ in shown if title == "captioning"]
    assert captioned == [3, 6, 9, 12]
    assert [(done, total) for title, done, total, _ in shown if title == "writing"] == [(n, 11) for n in (0, 3, 6, 9)]
    assert all(total >= done for _, done, total, _ in shown)
    assert shown[len(captioned) - 1][-1] == "1 failed"

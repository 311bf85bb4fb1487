"""Each format holds each photo once, in order, and reads back with the library that people read it with."""

import csv
import json
import os
import tarfile

import pytest
from fake import photo

from captioner.bulk import writers
from captioner.bulk.journal import Found, Row
from captioner.bulk.writers import Style, coco_id
from captioner.errors import CaptionerError, ImageError

NAMES = ["a/1.jpg", 'b,"c".png', "new\nline.png", "犬 – ü.png", os.fsdecode(b"caf\xe9.png"), "-dash.png", "\u2028.jpg"]
ROWS = [
    Row(name, (Found(f"caption {n}", -1.25, -0.5), Found("other", -2.0, -1.0)), 100 + n, "ab" * 32, "2026-01-01")
    for n, name in enumerate(NAMES)
]
FULL = Style(details=True, alternatives=True, satisfied=True, provenance={"model": "m", "options": {"beam_size": 3}})


def write(format_, path, style=Style(), rows=ROWS):  # noqa: B008
    if format_ == "webdataset":
        assert list(writers.webdataset(iter(rows), path, style, None)) == []
    else:
        writers.write(format_, iter(rows), path, style)
    assert not path.with_name(path.name + ".part").exists()
    return path


def test_json_lines(tmp_path):
    lines = write("jsonl", tmp_path / "x").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"image": name, "caption": f"caption {n}"} for n, name in enumerate(NAMES)
    ]
    full = [json.loads(line) for line in write("jsonl", tmp_path / "x", FULL).read_text().splitlines()]
    assert full[1] == {
        "image": NAMES[1],
        "caption": "caption 1",
        "satisfied": True,
        "captions": [
            {"caption": "caption 1", "score": -0.5, "logprob": -1.25},
            {"caption": "other", "score": -1.0, "logprob": -2.0},
        ],
        "logprob": -1.25,
        "bytes": 101,
        "sha256": "ab" * 32,
        "time": "2026-01-01",
        "model": "m",
        "options": {"beam_size": 3},
    }


def test_csv(tmp_path):
    path = write("csv", tmp_path / "x")
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.DictReader(file)) == [{"image": n, "caption": f"caption {i}"} for i, n in enumerate(NAMES)]
    with write("csv", tmp_path / "x", FULL).open(newline="", errors="surrogateescape") as file:
        row = list(csv.DictReader(file))[2]
    assert json.loads(row["captions"])[1]["caption"] == "other"
    assert json.loads(row["options"]) == {"beam_size": 3}


def test_coco(tmp_path):
    found = json.loads(write("coco", tmp_path / "x").read_text())
    assert found[0] == {"image_id": 1, "caption": "caption 0"}
    assert [each["caption"] for each in found] == [f"caption {n}" for n in range(len(NAMES))]
    assert json.loads(write("coco", tmp_path / "x", rows=[]).read_text()) == []


@pytest.mark.parametrize(
    ("image", "image_id"),
    [
        ("COCO_val2014_000000000042.jpg", 42),
        ("a/b/000000000139.jpg", 139),
        ("x/IMG_0012.jpg", 12),
        ("a dog.jpg", "a dog"),
        ("00.tar/0007.png", 7),
        ("0" * 30 + ".jpg", "0" * 30),
        ("data.parquet/17", 17),
    ],
)
def test_coco_ids(image, image_id):
    assert coco_id(image) == image_id


def shard(path, rows, read=None, **options):
    """Write a WebDataset; what was left out, and what is in it by name."""
    left_out = [
        (row.image, str(error)) for row, error in writers.webdataset(iter(rows), path, Style(), read, **options)
    ]
    with tarfile.open(path) as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert len(dict(found)) == len(found)
    return left_out, dict(found)


def rows_of(*images, size=-1):
    return [Row(image, (Found(f"of {image}", 0.0, 0.0),), size, id=f"/{image}") for image in images]


def test_webdataset_without_photos(tmp_path):
    with tarfile.open(write("webdataset", tmp_path / "x", FULL)) as tar:
        names = tar.getnames()
        assert names[:4] == ["000000000.json", "000000000.txt", "000000001.json", "000000001.txt"]
        assert tar.extractfile("000000003.txt").read() == b"caption 3"
        assert json.load(tar.extractfile("000000003.json"))["image"] == NAMES[3]
        assert len(names) == 2 * len(NAMES)
    _, found = shard(tmp_path / "x", rows_of("in/00.tar/b/0001.jpg", "in/00.tar/0002.seg.png"))
    assert list(found) == ["b/0001.json", "b/0001.txt", "0002.json", "0002.txt"]  # keys end at the first dot


def test_webdataset_with_photos(tmp_path):
    png = photo(tmp_path / "x.png").read_bytes()
    _, found = shard(tmp_path / "x", rows_of("a/1.JPG", "b", "data.parquet/7"), lambda id_: png)
    assert list(found) == [
        *("000000000.jpg", "000000000.json", "000000000.txt"),
        *("000000001.png", "000000001.json", "000000001.txt"),
        *("000000002.png", "000000002.json", "000000002.txt"),
    ]
    assert found["000000002.png"] == png
    assert found["000000001.txt"] == b"of b"
    for ending in ("tar", "tar.gz", "TGZ"):
        _, found = shard(tmp_path / "x", rows_of(f"in/00.{ending}/b/0001.PNG"), lambda id_: png)
        assert list(found) == ["b/0001.PNG", "b/0001.json", "b/0001.txt"]


def test_webdataset_names_that_would_be_there_twice_or_lead_elsewhere(tmp_path):
    rows = rows_of("00.tar/1.jpg", "00.tar/1.png", "00.tar/1.mask.png", "00.tar/2.png")
    _, found = shard(tmp_path / "x", rows, os.fsencode)
    assert list(found) == [
        *("1.jpg", "1.json", "1.txt"),
        *("1.png", "1.png.json", "1.png.txt"),
        *("1.mask.png", "1.mask.png.json", "1.mask.png.txt"),
        *("2.png", "2.json", "2.txt"),
    ]
    rows = rows_of("00.tar/../../etc/1.jpg", "00.tar//etc/1.jpg", "00.tar/a..b/..1.jpg")
    _, found = shard(tmp_path / "x", rows, os.fsencode)
    assert [name for name in found if name.endswith("jpg")] == ["000000000.jpg", "000000001.jpg", "a..b/..1.jpg"]
    _, found = shard(tmp_path / "x", rows_of("s/00.tar/1.jpg", "s/01.tar/1.jpg"), os.fsencode, several=True)
    assert [name for name in found if name.endswith("jpg")] == ["00/1.jpg", "01/1.jpg"]


def test_webdataset_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_SHARD", 3)
    path = tmp_path / "out-%03d.tar"

    def shards(*images):
        assert list(writers.webdataset(iter(rows_of(*images)), path, Style(), os.fsencode)) == []
        found = {}
        for each in sorted(tmp_path.iterdir()):
            with tarfile.open(each) as tar:
                found[each.name] = [name for name in tar.getnames() if name.endswith(".jpg")]
        return found

    def names(*numbers):
        return [f"{number:09}.jpg" for number in numbers]

    images = [f"{number}.jpg" for number in range(7)]
    expected = {"out-000.tar": names(0, 1, 2), "out-001.tar": names(3, 4, 5), "out-002.tar": names(6)}
    assert shards(*images) == expected
    assert shards(*images[:6]) == {name: expected[name] for name in ("out-000.tar", "out-001.tar")}
    assert shards(*images[:2]) == {"out-000.tar": names(0, 1)}
    assert shards() == {"out-000.tar": []}
    for name, second in [("a-%d.tar", "a-1.tar"), ("a%.tar", "a%.tar"), ("%05d", "00001"), ("%d%d.tar", "%d%d.tar")]:
        assert writers.nth(tmp_path / name, 1) == tmp_path / second


def test_webdataset_leaves_out_photos_that_are_gone_or_have_changed(tmp_path):
    def read(id_):
        if id_ == "/gone.jpg":
            raise ImageError("gone.jpg: no such file", "missing")
        return b"1234"

    rows = rows_of("a.jpg", "gone.jpg", size=4) + rows_of("b.jpg", size=5)
    left_out, found = shard(tmp_path / "x", rows, read)
    assert list(found) == ["000000000.jpg", "000000000.json", "000000000.txt"]
    assert [image for image, _ in left_out] == ["gone.jpg", "b.jpg"]
    assert left_out[1][1] == "b.jpg: has changed since it was captioned; give the same command again"


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(write("parquet", tmp_path / "x")).to_pylist()
    assert [row["caption"] for row in table] == [f"caption {n}" for n in range(len(NAMES))]
    assert [row["image"] for row in table][:4] == NAMES[:4]
    assert table[4]["image"] == r"caf\xe9.png"
    full = parquet.read_table(write("parquet", tmp_path / "x", FULL)).to_pylist()
    assert full[0]["captions"][1] == {"caption": "other", "score": -1.0, "logprob": -2.0}
    assert full[0]["options"] == '{"beam_size": 3}'
    assert parquet.read_table(write("parquet", tmp_path / "x", rows=[])).num_rows == 0


@pytest.mark.parametrize("format_", ["jsonl", "csv", "coco", "webdataset", "parquet"])
def test_the_same_rows_are_the_same_bytes_and_a_failure_leaves_the_old_file(tmp_path, format_):
    if format_ == "parquet":
        pytest.importorskip("pyarrow.parquet")
    path = write(format_, tmp_path / "x", FULL)
    before = path.read_bytes()
    assert write(format_, tmp_path / "y", FULL).read_bytes() == before

    def broken():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(format_, path, FULL, broken())
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x", "y"]
    with pytest.raises(CaptionerError, match=r"cannot be written \(No such file or directory\)"):
        write(format_, tmp_path / "none" / "x", FULL)


def test_failures(tmp_path):
    path = tmp_path / "failures"
    failed = [Row("a\nb", kind="damaged", reason="a\\nb: is damaged")]
    assert writers.write_failures(iter(failed), path) == 1
    assert json.loads(path.read_text()) == {"image": "a\nb", "class": "damaged", "reason": "a\\nb: is damaged"}
    assert writers.write_failures(iter([]), path) == 0
    assert not path.exists()

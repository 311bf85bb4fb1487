"""Three hundred bad files of every kind stop nothing: each is a row in the list of failures, or is captioned."""

import collections
import io
import json
import os
import random
import struct
import zlib

import numpy as np
import pytest
from fake import Fake, photo, provenance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import images
from captioner.bulk import run
from captioner.bulk.job import Job
from captioner.errors import CaptionerError

CLASSES = {"missing", "unreadable", "special", "not a photo", "damaged", "too large", "unsupported"}


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(side=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def png(width, height, kind=2, depth=8, rows=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GOOD = {kind: encoded(noise(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


STRANGE_NAMES = [
    "-dash.png", "new\nline.png", "quote\"'.png", " space.png", "tab\t.png", "dog 🐶.png", "n" * 251 + ".png",
    "caf\udce9.png", "\x1b[31m.png", "\u202egnp.png", "%s{0}$HOME`id`.png", "*?[a].png", "con.png", "a..png",
]  # fmt: skip


def bad_files():
    """(name, content), and whether it must fail; None where damage may leave a photo that can be seen."""
    random_ = random.Random(7)
    for kind, content in GOOD.items():
        ending = ENDINGS[kind]
        for share in np.linspace(0, 0.6, 16):  # truncated
            yield f"cut-{kind}-{share:.2f}.{ending}", content[: int(len(content) * share)], True
        for number in range(20):  # bytes changed
            data = bytearray(content)
            for _ in range(random_.choice([1, 5, 50])):
                data[random_.randrange(len(data))] = random_.randrange(256)
            yield f"bits-{kind}-{number}.{ending}", bytes(data), None
        wrong = random_.choice([other for other in ENDINGS.values() if other != ending])
        yield f"wrong-ending-{kind}.{wrong}", content, False
        yield f"zeros-{kind}.{ending}", content[:30] + bytes(len(content)), None
        yield f"swapped-{kind}.{ending}", content[len(content) // 2 :] + content[: len(content) // 2], True
    for number in range(50):
        yield f"random-{number}.jpg", random_.randbytes(random_.choice([1, 10, 1000, 20_000])), True
    for name, content in (
        ("empty", b""), ("newline", b"\n"), ("html", b"<html><body>404</body></html>"), ("pdf", b"%PDF-1.7\n%x"),
        ("ps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("zip", b"PK\3\4" + bytes(50)),
        ("ppm", b"P6 2 2 255 " + bytes(12)), ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("heic", b"\0\0\0\x18ftypheic" + bytes(99)), ("avif", b"\0\0\0\x18ftypavif" + bytes(99)),
        ("elf", b"\x7fELF" + bytes(99)), ("json", b'{"error": "not found"}'), ("gifhead", b"GIF89a"),
    ):  # fmt: skip
        yield f"other-{name}.jpg", content, True
    for width, height in ((14_000, 14_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0)):
        yield f"bomb-{width}-{height}.png", png(width, height), True
    for mode in ("1", "L", "P", "CMYK", "I;16", "LA", "RGBA", "F", "YCbCr"):
        kind = "JPEG" if mode in ("CMYK", "YCbCr") else "TIFF" if mode in ("F", "I;16") else "PNG"
        yield f"mode-{mode.replace(';', '')}.{ENDINGS[kind]}", encoded(Image.new(mode, (9, 9)), kind), False
    frames = [Image.new("RGB", (9, 9), (n, n, n)) for n in range(5)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield f"animated.{ENDINGS[kind]}", moving, False
        yield f"animated-cut.{ENDINGS[kind]}", moving[: len(moving) // 4], None
    for name in STRANGE_NAMES:
        yield name, GOOD["PNG"], False


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_of_bad_files(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    must_fail, may_fail, good = set(), set(), set()
    for name, content, fails in bad_files():
        path = f"{folder}/{name}"
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(content)
        {True: must_fail, False: good, None: may_fail}[fails].add(path)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to(folder / "nothing.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    must_fail |= {f"{folder}/{name}" for name in ("pipe.jpg", "device.jpg", "gone.jpg", "loop.jpg")}
    assert len(must_fail | may_fail) >= 300
    report = run.run(Job(photos=(str(folder),), output=tmp_path / "out.jsonl", quiet=True), Fake(), provenance())
    rows = [json.loads(line)["image"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    failed = [json.loads(line) for line in report.failures.read_text().splitlines()]
    names = collections.Counter(rows + [row["image"] for row in failed])
    assert set(names) == must_fail | may_fail | good
    assert set(names.values()) == {1}
    assert good <= set(rows)
    assert must_fail <= {row["image"] for row in failed}
    for row in failed:
        assert row["class"] in CLASSES, row
        assert len(row["reason"].splitlines()) == 1
        assert row["reason"].isprintable() or "\\" in row["reason"]
    assert {row["class"] for row in failed} >= {"missing", "special", "not a photo", "damaged", "too large"}
    assert report.status == 1


def test_photos_that_vanish_while_they_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "album"
    paths = [photo(folder / f"{n}.png", n) for n in range(6)]
    load = images.load

    def vanish(source, size, **options):
        if str(source).endswith("0.png"):
            paths[3].unlink()
            paths[4].unlink()
            paths[4].mkdir()
        return load(source, size, **options)

    monkeypatch.setattr(images, "load", vanish)
    job = Job(photos=(str(folder),), output=tmp_path / "out.jsonl", quiet=True, workers=1)
    report = run.run(job, Fake(), provenance())
    assert [json.loads(line)["class"] for line in report.failures.read_text().splitlines()] == ["missing", "special"]
    assert report.captioned == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_bytes_are_a_photo_or_an_error_of_one_line(data):
    kind = data.draw(st.sampled_from([*GOOD, "none"]))
    content = bytearray(GOOD.get(kind, b""))
    for start, insertion in data.draw(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=20)), max_size=5)):
        content[start : start + len(insertion)] = insertion
    content = bytes(content)[: data.draw(st.integers(0, 4000))]
    said = "one line"
    try:
        assert images.load(content, 8).shape == (3, 8, 8)
    except CaptionerError as error:
        said = str(error)
    assert len(said.splitlines()) == 1


@pytest.mark.filterwarnings("ignore::Warning")
def test_a_photo_of_nine_hundred_million_pixels_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(30_000, 30_000, rows=b"\0" * 90_001))
    with pytest.raises(CaptionerError, match="has more than 178 million pixels"):
        images.load(path, 32)

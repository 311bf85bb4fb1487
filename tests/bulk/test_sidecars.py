"""Sidecars: named as photo managers expect, read by exiftool, and nothing that they said before is lost."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from xml.dom import minidom

import pytest
from fake import Fake, caption, photo, provenance

from captioner.bulk import run, sidecars
from captioner.bulk.job import Job
from captioner.bulk.journal import Found, Row
from captioner.bulk.sidecars import Rules

CAPTION = 'a dog & a "cat" on <a> beach'
LIGHTROOM = """<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmp:Rating="4" crs:Exposure2012="+0.35">
   <!-- a remark -->
   <dc:subject><rdf:Bag><rdf:li>holiday</rdf:li><rdf:li>sea</rdf:li></rdf:Bag></dc:subject>
   %s
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>"""
GERMAN = '<rdf:li xml:lang="de-DE">ein Hund</rdf:li>'
DESCRIBED = (
    '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">by hand</rdf:li>' + GERMAN + "</rdf:Alt></dc:description>"
)
ONLY_GERMAN = f"<dc:description><rdf:Alt>{GERMAN}</rdf:Alt></dc:description>"


def write(image, rules=None, text=CAPTION):
    rules = rules or Rules("xmp", model="mini")
    failures = list(sidecars.write([Row(str(image), (Found(text, -3.0, -1.25),))], rules))
    return failures[0][1] if failures else None


def exif(path):
    tool = shutil.which("exiftool")
    if tool is None:
        pytest.skip("needs exiftool (Debian: libimage-exiftool-perl)")
    done = subprocess.run([tool, "-j", "-a", "-G1", path], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stdout
    return json.loads(done.stdout)[0]


def descriptions(path):
    document = minidom.parse(str(path))
    return [item.toxml() for item in document.getElementsByTagName("rdf:li") if item.hasAttribute("xml:lang")]


def test_a_new_sidecar_is_read_by_exiftool(tmp_path):
    image = photo(tmp_path / "photo.png")
    before = image.read_bytes()
    assert write(image) is None
    path = tmp_path / "photo.png.xmp"
    tags = exif(path)
    assert tags["XMP-dc:Description"] == CAPTION
    assert tags["XMP-captioner:Model"] == "mini"
    assert tags["XMP-captioner:Score"] == -1.25
    assert tags["XMP-captioner:Source"] == "photo.png"
    assert image.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["photo.png", "photo.png.xmp"]


@pytest.mark.parametrize(("names", "expected"), [("photo.jpg.xmp", "a.b.jpg.xmp"), ("photo.xmp", "a.b.xmp")])
def test_both_ways_to_name_them(tmp_path, names, expected):
    image = photo(tmp_path / "a.b.jpg")
    assert write(image, Rules("xmp", names=names)) is None
    assert (tmp_path / expected).is_file()


@pytest.mark.parametrize(
    "declared",
    ["", '<?xml version="1.0" encoding="UTF-8"?>\n', "\ufeff", '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>'],
)
@pytest.mark.parametrize("described", ["", ONLY_GERMAN])
def test_a_sidecar_of_another_program_is_merged(tmp_path, declared, described):
    image = photo(tmp_path / "a.jpg")
    path = tmp_path / "a.jpg.xmp"
    path.write_text(declared + LIGHTROOM % described, encoding="utf-8")
    rules = Rules("xmp", model="mini", overwrite=bool(described))
    assert write(image, rules) is None
    tags = exif(path)
    assert tags["XMP-dc:Description"] == CAPTION
    assert tags["XMP-dc:Subject"] == ["holiday", "sea"]
    assert (tags["XMP-xmp:Rating"], tags["XMP-crs:Exposure2012"]) == (4, "+0.35")
    assert "<!-- a remark -->" in path.read_text(encoding="utf-8")
    if described:
        assert tags["XMP-dc:Description-de-DE"] == "ein Hund"
    assert ("<?xml" in path.read_text(encoding="utf-8")) == ("<?xml" in declared)
    before = path.read_bytes()
    assert write(image, rules) is None
    assert path.read_bytes() == before  # once more changes nothing


@pytest.mark.parametrize("described", [DESCRIBED, 'x" /><rdf:Description rdf:about="" dc:description="by hand'])
def test_a_description_by_hand_is_replaced_only_if_asked(tmp_path, described):
    image = photo(tmp_path / "a.jpg")
    path = tmp_path / "a.jpg.xmp"
    text = LIGHTROOM % DESCRIBED
    if "/>" in described:
        text = (LIGHTROOM % "").replace('xmp:Rating="4"', 'xmp:Rating="4" dc:description="by hand"')
    path.write_text(text)
    error = write(image)
    assert str(error) == f"{path}: has a description already; give --overwrite or --skip-existing"
    assert error.kind == "existing"
    assert path.read_text() == text
    assert write(image, Rules("xmp", skip_existing=True)) is None
    assert path.read_text() == text
    assert sidecars.exists(str(image), Rules("xmp"))
    assert write(image, Rules("xmp", overwrite=True)) is None
    assert exif(path)["XMP-dc:Description"] == CAPTION
    assert "by hand" not in path.read_text()
    if described == DESCRIBED:
        assert exif(path)["XMP-dc:Description-de-DE"] == "ein Hund"


def test_its_own_caption_is_replaced_by_a_better_one(tmp_path):
    image = photo(tmp_path / "a.jpg")
    assert write(image) is None
    assert write(image, text="a better caption") is None
    assert exif(tmp_path / "a.jpg.xmp")["XMP-dc:Description"] == "a better caption"
    path = tmp_path / "a.jpg.xmp"
    path.write_text(path.read_text().replace(">a better caption<", ">by hand now<"))
    assert "has a description already" in str(write(image, text="a third"))


def test_two_photos_do_not_share_a_sidecar(tmp_path):
    rules = Rules("xmp", names="photo.xmp")
    assert write(photo(tmp_path / "a.jpg"), rules) is None
    assert "is the sidecar of a.jpg; name sidecars photo.jpg.xmp" in str(write(photo(tmp_path / "a.png"), rules))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no XML", b"<a/>", b"<a", b"\xff\xfe<", bytes(100),
        b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        b'<?xml version="1.0" encoding="nonsense"?><a/>',
    ],
)  # fmt: skip
def test_what_is_no_xmp_is_left_as_it_is(tmp_path, content):
    image = photo(tmp_path / "a.jpg")
    path = tmp_path / "a.jpg.xmp"
    path.write_bytes(content)
    error = write(image, Rules("xmp", overwrite=True))
    assert error.kind == "existing"
    assert len(str(error).splitlines()) == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["a&b.jpg", 'a"b<c>.jpg', "a\nb.jpg", "a\x01b.jpg", "犬.jpg", "caf\udce9.jpg"])
def test_names_that_xml_cannot_hold(tmp_path, name):
    image = photo(tmp_path / name)
    assert write(image) is None
    assert minidom.parse(str(image) + ".xmp")
    assert write(image, text="other") is None  # known as its own


def test_text_sidecars(tmp_path):
    image = photo(tmp_path / "a.jpg")
    rules = Rules("txt")
    assert write(image, rules) is None
    path = tmp_path / "a.txt"
    assert path.read_text() == CAPTION + "\n"
    path.write_text("by hand")
    assert "is there already; give --overwrite or --skip-existing" in str(write(image, rules))
    assert write(image, Rules("txt", skip_existing=True)) is None
    assert path.read_text() == "by hand"
    assert write(image, Rules("txt", overwrite=True)) is None
    assert path.read_text() == CAPTION + "\n"


def test_a_run_with_sidecars(tmp_path):
    folder = tmp_path / "album"
    for number in range(5):
        photo(folder / f"{number}.png", number)
    originals = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    (folder / "2.txt").write_text("by hand")
    report = run.run(Job(photos=(str(folder),), format="txt", quiet=True), Fake(), provenance())
    assert (report.status, report.captioned, report.failed) == (1, 5, 1)
    (failure,) = map(json.loads, report.failures.read_text().splitlines())
    assert (failure["image"], failure["class"]) == (str(folder / "2.png"), "existing")
    assert report.failures.parent == folder
    assert (folder / "3.txt").read_text() == caption(3, 0, 7).text + "\n"
    assert (folder / "2.txt").read_text() == "by hand"
    job = Job(photos=(str(folder),), format="txt", quiet=True, skip_existing=True)
    report = run.run(job, Fake(), provenance())
    assert (report.status, report.skipped, report.captioned) == (0, 5, 0)
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in originals} == originals


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(path, content, durable=True):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sidecars.files, "write", refuse)
    error = write(photo(tmp_path / "a.jpg"))
    assert str(error) == f"{tmp_path}/a.jpg.xmp: cannot be written (Permission denied); change its folder's permissions"
    assert Path(tmp_path / "a.jpg.xmp").exists() is False

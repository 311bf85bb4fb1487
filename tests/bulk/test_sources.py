"""Photos are found wherever they are, in an order that stays, and places that cannot be read are said."""

import bz2
import gzip
import io
import lzma
import os
import random
import sys
import tarfile
from pathlib import Path

import pytest
from fake import photo

from captioner import images
from captioner.bulk import cluster, sources
from captioner.bulk.job import Job
from captioner.bulk.journal import Todo
from captioner.errors import CaptionerError, ImageError


def found(*photos, **options):
    return list(sources.find(Job(photos=tuple(map(str, photos)), **options)))


def names(items, folder):
    return [os.path.relpath(item.image, folder) for item in items]


@pytest.fixture
def album(tmp_path):
    folder = tmp_path / "album"
    for name in ("b.png", "a/2.jpg", "a/1.png", "thumbs/b.png", ".hidden.png", "c.txt"):
        photo(folder / name) if not name.endswith("txt") else (folder / name).write_text("no photo")
    return folder


def test_a_folder(album):
    items = found(album)
    assert names(items, album) == ["a/1.png", "a/2.jpg", "b.png", "thumbs/b.png"]
    assert [item.id for item in items] == [item.image for item in items]
    for item in items:
        assert (item.size, item.modified) == (Path(item.image).stat().st_size, Path(item.image).stat().st_mtime_ns)
        assert item.error is None
    assert sources.count(Job(photos=(str(album),))) == 4


def test_a_folder_with_conditions(album):
    assert names(found(album, not_recursive=True), album) == ["b.png"]
    assert names(found(album, hidden=True), album)[0] == ".hidden.png"
    assert names(found(album, exclude=("thumbs/*",)), album) == ["a/1.png", "a/2.jpg", "b.png"]
    assert names(found(album, include=("*.jpg", "b.*")), album) == ["a/2.jpg", "b.png", "thumbs/b.png"]
    assert names(found(album, include=("b.*",), exclude=("thumbs/*",)), album) == ["b.png"]
    with pytest.raises(ImageError, match="album: no photo in this folder"):
        found(album, include=("*.gif",))


def test_ids_do_not_depend_on_where_the_command_is_given(album, monkeypatch):
    monkeypatch.chdir(album.parent)
    relative = found("album", "album/b.png")
    monkeypatch.chdir(album)
    other = found(".", "b.png")
    assert (
        [item.id for item in relative]
        == [item.id for item in other]
        == [item.id for item in found(album, album / "b.png")]
    )
    assert relative[0].image == "album/a/1.png"
    for other_name in ("../album", "../album/", "./"):
        assert [item.id for item in found(other_name)] == [item.id for item in other[:-1]]
    assert Path(other[0].image) == Path("a/1.png")


def test_places_that_cannot_be_read_are_items_with_an_error(album):
    (album / "d.jpg").symlink_to(album / "gone.jpg")
    (last,) = [item for item in found(album) if item.error]
    assert last.image == str(album / "d.jpg")
    assert last.error.kind == "missing"


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
@pytest.mark.parametrize("end", [True, False])
def test_a_list_of_files(album, tmp_path, monkeypatch, separator, end):
    listed = [os.fsencode(album / name) for name in ("b.png", "a/1.png")] + [b"caf\xe9.png", b"gone.png"]
    content = separator.join(listed) + (separator if end else b"")
    (tmp_path / "list").write_bytes(content)
    items = found(list=str(tmp_path / "list"))
    assert [os.fsencode(item.image) for item in items] == listed
    assert sources.count(Job(list=str(tmp_path / "list"))) == 4
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert found(list="-") == items


def test_names_with_newlines_in_a_list(tmp_path):
    (tmp_path / "list").write_bytes(b"a\nb.png\0c.png\0")
    assert [item.image for item in found(list=str(tmp_path / "list"))] == ["a\nb.png", "c.png"]
    (tmp_path / "long").write_bytes(b"\n".join(b"%06d.png" % number for number in range(50_000)))
    assert [item.image for item in found(list=str(tmp_path / "long"))] == [f"{n:06}.png" for n in range(50_000)]
    with pytest.raises(CaptionerError, match="none: cannot be read"):
        found(list=str(tmp_path / "none"))


def add(tar, name, content, **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shard(tmp_path):
    """A shard of a WebDataset, with members that are no photos, and some that are bad."""
    content = photo(tmp_path / "photo.png", 5).read_bytes()
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        add(tar, "b/0001.png", content)
        add(tar, "b/0001.json", b"{}")
        add(tar, "b/0001.txt", b"text")
        add(tar, "../../etc/0002.jpg", b"no photo")
        add(tar, "a/0003.PNG", content)
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "folder.png", b"", type=tarfile.DIRTYPE)
        add(tar, "last.png", content)
    return tmp_path / "00.tar"


def test_a_shard_is_read_in_its_order_and_not_unpacked(shard):
    items = found(shard)
    expected = ["b/0001.png", "../../etc/0002.jpg", "a/0003.PNG", "link.png", "last.png"]
    assert [item.image for item in items] == [f"{shard}/{name}" for name in expected]
    for item in (items[0], items[2], items[4]):
        assert images.load(item.read(), 8)[0, 0, 0] == 5
    assert items[3].error.kind == "special"
    assert items[1].read() == b"no photo"
    assert sources.count(Job(photos=(str(shard),))) == 5


def test_a_shard_that_breaks_off(shard):
    whole = shard.read_bytes()
    last = found(shard)[-1]
    shard.write_bytes(whole[: last.content.offset + 10])
    items = found(shard)
    assert len(items) == 5
    assert items[-1].error.kind == "damaged"
    assert "lies beyond the end of the shard" in str(items[-1].error)
    shard.write_bytes(whole[: last.content.offset - 10])  # within a header
    assert [item.error is not None for item in found(shard)] == [False, False, False, True, True]
    broken = bytearray(whole)
    broken[last.content.offset - 512] ^= 1
    shard.write_bytes(broken)
    assert [item.error is not None for item in found(shard)] == [False, False, False, True, True]
    for content in (b"", b"no tar at all" * 100, whole[:100]):
        shard.write_bytes(content)
        assert [item.error is not None for item in found(shard)] == [True]


PACKED = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress, ".TAR.XZ": lzma.compress}


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_shard(shard, ending):
    plain = found(shard)
    whole = PACKED[ending](shard.read_bytes())
    packed = shard.with_name("00" + ending)
    packed.write_bytes(whole)
    items = found(packed)
    assert [item.image for item in items] == [item.image.replace(str(shard), str(packed)) for item in plain]
    assert [item.size for item in items] == [item.size for item in plain]
    assert [item.read() for item in items if not item.error] == [item.read() for item in plain if not item.error]
    assert items[3].error.kind == "special"
    assert sources.count(Job(photos=(str(packed), str(shard)))) == 5  # those of the other
    packed.write_bytes(whole[:50] + bytes(20) + whole[70:])
    assert found(packed)[-1].error.kind == "damaged"


@pytest.mark.parametrize("ending", PACKED)
def test_a_compressed_shard_that_breaks_off(tmp_path, ending):
    plain = tmp_path / "00.tar"
    with tarfile.open(plain, "w") as tar:
        for number in range(6):
            add(tar, f"{number}.png", random.Random(number).randbytes(700))
    packed = tmp_path / f"00{ending}"
    whole = PACKED[ending](plain.read_bytes())
    for end in range(0, len(whole) - 100, 97):  # the last bytes are those of the end of the tar
        packed.write_bytes(whole[:end])
        *before, last = found(packed)
        assert last.error.kind == "damaged"
        assert [item.read() for item in before] == [item.read() for item in found(plain)[: len(before)]]


def test_a_photo_that_is_too_large_in_a_compressed_shard(shard, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST", 10)
    packed = shard.with_name("00.tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    kinds = [item.error and item.error.kind for item in found(packed)]
    assert kinds == ["too large", None, "too large", "special", "too large"]


def test_other_compressed_shards_are_refused_before_work_begins(tmp_path):
    (tmp_path / "00.tar.zst").touch()
    job = Job(photos=(str(tmp_path / "00.tar.zst"),))
    if sys.version_info < (3, 14):
        with pytest.raises(CaptionerError, match=r"00\.tar\.zst: is compressed as this Python cannot .+ zstd -d"):
            sources.check(job.photos[0], job)


def test_photos_are_read_again_by_their_ids(shard, album, tmp_path):
    packed = tmp_path / "01.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    job = Job(photos=(str(packed), str(album), str(shard), str(album / "b.png")))
    items = [item for item in sources.find(job) if item.error is None]
    read = sources.reader(job)
    for number, item in enumerate(items):
        content = item.read()
        if number % 3:  # not all are asked for
            assert read(item.id) == (content if isinstance(content, bytes) else Path(content).read_bytes())
    read = sources.reader(job)
    with pytest.raises(ImageError, match="gone: no such file"):
        read(str(album / "gone"))
    with pytest.raises(ImageError, match=r"b/0001\.png: is not there any more"):
        sources.reader(Job(photos=(str(album),)))(f"{shard}/b/0001.png")
    shard.unlink()
    with pytest.raises(ImageError, match="no such file"):
        read(f"{shard}/b/0001.png")
    assert read(str(album / "b.png")) == (album / "b.png").read_bytes()


def test_photos_in_memory_are_taken_a_few_at_a_time():
    items = [sources.Item(str(number), "", bytes(10)) for number in range(10)]
    assert len(list(sources.some(iter(items), 3, 1000))) == 3
    assert len(list(sources.some(iter(items), 20, 35))) == 4
    assert len(list(sources.some(iter(items), 20, 1000))) == 10


def test_a_cluster_is_given_photos_in_memory_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(cluster, "_WAVE_BYTES", 35)
    todo = iter([Todo(number, sources.Item(str(number), "", bytes(10))) for number in range(10)])
    assert [len(list(cluster._wave(todo))) for _ in range(4)] == [4, 4, 2, 0]


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = [photo(tmp_path / f"{n}.png", n).read_bytes() for n in range(70)]
    kinds = {
        "plain": pa.table({"image": content, "label": list(range(70))}),
        "datasets": pa.table({"image": [{"bytes": each, "path": "x"} for each in content]}),
        "other": pa.table({"picture": content}),
    }
    for name, table in kinds.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(table, path, row_group_size=16)
        items = found(path)
        assert [item.image for item in items] == [f"{path}/{row}" for row in range(70)]
        assert [item.read() for item in items] == content
        assert sources.count(Job(photos=(str(path),))) == 70
    parquet.write_table(pa.table({"image": [content[0], None]}), path)
    assert [item.error is None for item in found(path)] == [True, False]
    parquet.write_table(pa.table({"label": [1]}), path)
    with pytest.raises(CaptionerError, match=r"has no column of photos \(bytes\), only label"):
        found(path)
    parquet.write_table(pa.table({"x": [b""], "y": [b""]}), path)
    with pytest.raises(CaptionerError, match=r"several columns of bytes \(x, y\); name the photos' one 'image'"):
        found(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(CaptionerError, match="is no Parquet file, or is damaged"):
        found(path)


def test_a_path_that_is_not_there(tmp_path):
    for name in ("none.jpg", "none.tar", "none.parquet", "none"):
        with pytest.raises(ImageError, match="no such file or folder"):
            found(tmp_path / name)

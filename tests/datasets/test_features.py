"""The store keeps every row it has said it keeps, and never gives a row to the wrong photo."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner import images
from captioner.config import EncoderConfig
from captioner.datasets import features
from captioner.datasets.annotations import Annotations, Example, Problems
from captioner.datasets.features import FeatureStore, Stamp
from captioner.errors import FeatureStoreError
from captioner.networks.encoder import Encoder

STAMP = Stamp("squeezenet1_1", "abc" * 20, 224, "whole photo")
ROW = 8192


def rows(*values):
    return np.repeat(np.array(values, np.float32)[:, None], 4096, axis=1)


def store_of(folder, *ids):
    """A store in which photo number n of the list has features of n and a file of 100 + n bytes."""
    store = FeatureStore(folder, STAMP)
    with store.writer() as writer:
        for number, image_id in enumerate(ids):
            writer.append([(image_id, 100 + number)], rows(number))
    return store


def contents(store):
    """Photo -> its features, which are one number 4096 times."""
    everything = store.features()
    assert everything.shape == (len(store), 4096)
    assert everything.dtype == np.float16
    assert (everything == everything[:, :1]).all()
    return {image_id: float(everything[row, 0]) for image_id, row in store.row_of.items()}


def test_what_is_appended_is_read(tmp_path):
    store = FeatureStore(tmp_path / "new/folder", STAMP)
    assert len(store) == 0
    assert contents(store) == {}
    with store.writer() as writer:
        writer.append([(7, 70), (3, 30)], rows(1, 2))
        writer.append([(5, 50)], rows(3))
    for each in (store, FeatureStore(tmp_path / "new/folder", STAMP)):
        assert len(each) == 3
        assert contents(each) == {7: 1, 3: 2, 5: 3}
        assert list(each.row_of) == [7, 3, 5]
        assert [each.size_of(image_id) for image_id in (7, 3, 5)] == [70, 30, 50]
        assert 3 in each
        assert 4 not in each
    assert (tmp_path / "new/folder/features.f16").stat().st_size == 3 * ROW
    with pytest.raises((ValueError, OSError)):
        store.features()[0] = 1  # mapped to be read


def test_rows_are_added_to_those_that_are_there(tmp_path):
    store_of(tmp_path, "a", "b")
    store = FeatureStore(tmp_path, STAMP)
    with store.writer() as writer:
        writer.append([("c", 9)], rows(5))
    assert contents(FeatureStore(tmp_path, STAMP)) == {"a": 0, "b": 1, "c": 5}


def test_all_photos_of_coco_fit_into_a_gigabyte(tmp_path):
    store = store_of(tmp_path, "COCO_train2014_000000000001.jpg")
    used = sum((tmp_path / name).stat().st_size for name in ("features.f16", "rows.jsonl"))
    assert used * 123_287 < 1.02e9
    assert len(store) == 1


def test_numbers_and_texts_are_different_ids(tmp_path):
    ids = [1, "1", "a b", "ü\n", 12**15, ""]
    store = store_of(tmp_path, *ids)
    assert contents(store) == contents(FeatureStore(tmp_path, STAMP)) == dict(zip(ids, range(6), strict=True))


def test_large_numbers_become_the_largest(tmp_path):
    store = FeatureStore(tmp_path, STAMP)
    with store.writer() as writer:
        writer.append([(1, 1), (2, 1), (3, 1)], rows(1e9, 65504, -np.inf))
    assert contents(store) == {1: 65504, 2: 65504, 3: -65504}


def test_precision_is_that_of_half(tmp_path):
    numbers = np.random.default_rng(0).random((4, 4096), np.float32) * 50
    store = FeatureStore(tmp_path, STAMP)
    with store.writer() as writer:
        writer.append([(n, 1) for n in range(4)], numbers)
    assert np.allclose(store.features(), numbers, rtol=2**-11, atol=0)


# What is left of a process that was stopped


@pytest.mark.parametrize("rest", [b"", b"x", bytes(ROW - 1), bytes(3 * ROW + 5)])
@pytest.mark.parametrize("line", [b"", b'["c', b'["c", 5]', b"\0\0\0"])
def test_what_is_half_written_is_cut_off(tmp_path, rest, line):
    store_of(tmp_path, "a", "b")
    for name, extra in (("features.f16", rest), ("rows.jsonl", line)):
        with (tmp_path / name).open("ab") as file:
            file.write(extra)
    store = FeatureStore(tmp_path, STAMP)
    assert contents(store) == {"a": 0, "b": 1}
    with store.writer() as writer:
        writer.append([("c", 9)], rows(5))
    assert contents(store) == contents(FeatureStore(tmp_path, STAMP)) == {"a": 0, "b": 1, "c": 5}
    assert (tmp_path / "features.f16").stat().st_size == 3 * ROW
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 3


def test_lines_without_features_are_cut_off(tmp_path):
    store_of(tmp_path, "a", "b", "c")
    os.truncate(tmp_path / "features.f16", 2 * ROW - 1)
    store = FeatureStore(tmp_path, STAMP)
    assert contents(store) == {"a": 0}
    with store.writer() as writer:
        writer.append([("c", 9)], rows(5))
    assert contents(FeatureStore(tmp_path, STAMP)) == {"a": 0, "c": 5}


def test_spaces_in_the_index_do_no_harm(tmp_path):
    store_of(tmp_path, "a", "b")
    (tmp_path / "rows.jsonl").write_text('["a",100]\n[ "b", 101 ]\n')
    with FeatureStore(tmp_path, STAMP).writer() as writer:
        writer.append([("c", 9)], rows(5))
    assert contents(FeatureStore(tmp_path, STAMP)) == {"a": 0, "b": 1, "c": 5}


def python(code, *arguments):
    """Start another process that uses the package."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ADDING = """
    import sys
    from pathlib import Path
    import numpy as np
    from captioner.datasets.features import FeatureStore, Stamp

    store = FeatureStore(Path(sys.argv[1]), Stamp("squeezenet1_1", "abc" * 20, 224, "whole photo"))
    with store.writer() as writer:
        print("adding", flush=True)
        for n in range(len(store), 10**6, 3):
            numbers = np.repeat(np.arange(n, n + 3, dtype=np.float32)[:, None] % 1000, 4096, axis=1)
            writer.append([(f"photo {i}", i) for i in range(n, n + 3)], numbers)
            print(n + 3, flush=True)
    """


def test_a_process_that_is_killed_loses_nothing(tmp_path):
    reported = 0
    for lines in (5, 30):
        process = python(ADDING, tmp_path)
        assert process.stdout.readline() == "adding\n"
        for _ in range(lines):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = FeatureStore(tmp_path, STAMP)
        assert len(store) >= reported
        assert contents(store) == {f"photo {n}": n % 1000 for n in range(len(store))}
    with store.writer() as writer:  # a dead process holds no lock
        writer.append([("last", 9)], rows(5))
    assert contents(FeatureStore(tmp_path, STAMP))["last"] == 5


def test_one_writer_at_a_time(tmp_path):
    store = store_of(tmp_path, "a")
    message = rf"^{tmp_path}: another process is adding features; wait for it, or choose another --features$"
    with store.writer(), pytest.raises(FeatureStoreError, match=message), FeatureStore(tmp_path, STAMP).writer():
        pass
    process = python(ADDING, tmp_path)
    process.stdout.readline()
    try:
        with pytest.raises(FeatureStoreError, match=message), store.writer():
            pass
        while len(FeatureStore(tmp_path, STAMP)) < 4:  # reading goes on meanwhile
            pass
    finally:
        process.kill()
        process.communicate()
    with store.writer():
        assert len(store) >= 4  # it has what the other one added
    assert store.features().shape[0] == len(store)


# A disk that is full


def test_a_full_disk_keeps_what_was_stored(tmp_path):
    """A limit on the size of files makes a real write fail in its middle, as a full disk does."""
    process = python(
        """
        import resource, signal, sys
        from pathlib import Path
        import numpy as np
        from captioner.errors import FeatureStoreError
        from captioner.datasets.features import FeatureStore, Stamp

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        stamp = Stamp("squeezenet1_1", "abc" * 20, 224, "whole photo")
        store = FeatureStore(Path(sys.argv[1]), stamp)
        with store.writer() as writer:
            writer.append([("a", 1), ("b", 2)], np.ones((2, 4096)))
            resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 8192 + 100, resource.RLIM_INFINITY))
            for attempt in range(2):
                try:
                    writer.append([("c", 3), ("d", 4)], np.ones((2, 4096)))
                except FeatureStoreError as error:
                    print(error)
            writer.append([("e", 5)], np.full((1, 4096), 2.0))
        print(len(store))
        """,
        tmp_path,
    )
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    message = "cannot be written (File too large); the 2 photos stored so far are kept: make room and run the same"
    assert output.count(message) == 2
    assert output.splitlines()[-1] == "3"
    assert contents(FeatureStore(tmp_path, STAMP)) == {"a": 1, "b": 1, "e": 2}


def test_no_space_for_the_index(tmp_path, monkeypatch):
    store = store_of(tmp_path, "a")
    opened = Path.open

    class Full:
        """A file on a full disk: half of what is written arrives, and closing fails as well."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()
            raise OSError(28, "No space left on device")

    def open_full(path, mode="r", **options):
        file = opened(path, mode, **options)
        return Full(file) if mode == "ab" and path.name == "rows.jsonl" else file

    with store.writer() as writer:
        monkeypatch.setattr(Path, "open", open_full)
        with pytest.raises(
            FeatureStoreError, match=r"\(No space left on device\); the 1 photos stored so far are kept"
        ):
            writer.append([("b", 1), ("c", 1)], rows(1, 2))
        monkeypatch.undo()
        writer.append([("d", 1)], rows(3))
    assert contents(store) == contents(FeatureStore(tmp_path, STAMP)) == {"a": 0, "d": 3}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(
        FeatureStoreError, match=r"file: cannot be used as a feature store \(File exists\); .* --features DIR$"
    ):
        FeatureStore(tmp_path / "file", STAMP)
    store = store_of(tmp_path / "store", "a")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(FeatureStoreError, match=r"store: cannot be written \(Permission denied\)"), store.writer():
        pass
    monkeypatch.undo()
    with store.writer():  # the lock was given back
        pass


# Stores of something else, and damaged ones


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"encoder": "vgg16"}, "encoder is 'squeezenet1_1' there and 'vgg16' here"),
        ({"weights_sha256": "123"}, f"weights_sha256 is '{'abc' * 20}' there and '123' here"),
        ({"image_size": 256}, "image_size is 224 there and 256 here"),
        ({"preprocessing": "v2"}, "preprocessing is 'whole photo' there and 'v2' here"),
    ],
)
def test_a_store_that_something_else_made(tmp_path, change, difference):
    store_of(tmp_path, "a")
    with pytest.raises(FeatureStoreError, match=r"choose another folder with --features$") as caught:
        FeatureStore(tmp_path, replace(STAMP, **change))
    assert str(caught.value).startswith(f"{tmp_path}: these features were made differently: {difference}; ")
    both = replace(STAMP, **change, dtype="float32")
    with pytest.raises(FeatureStoreError, match="dtype is 'float16' there and 'float32' here; "):
        FeatureStore(tmp_path, both)
    assert contents(FeatureStore(tmp_path, STAMP)) == {"a": 0}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3"])
def test_a_damaged_stamp(tmp_path, content):
    store_of(tmp_path, "a")
    (tmp_path / "stamp.json").write_bytes(content)
    with pytest.raises(FeatureStoreError, match=r"stamp\.json: damaged \([^\n]+\); delete the folder, it will be made"):
        FeatureStore(tmp_path, STAMP)


@pytest.mark.parametrize("line", [b"hello", b"3", b"[1]", b"[1, 2, 3]", b"[[1], 2]", b"\xff\xfe", b"", b'["a", 100]'])
def test_a_damaged_index(tmp_path, line):
    store_of(tmp_path, "a", "b", "c")
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines()
    lines[1] = line
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(FeatureStoreError, match=rf"rows\.jsonl:2: damaged; delete {tmp_path}, it will be made again$"):
        FeatureStore(tmp_path, STAMP)


def test_the_stamp_of_an_encoder():
    encoder = Encoder(EncoderConfig("tiny", "random", 40))
    stamp = Stamp.of(encoder)
    assert (stamp.encoder, stamp.image_size, stamp.feature_size, stamp.dtype) == ("tiny", 40, 4096, "float16")
    assert stamp.weights_sha256 == encoder.weights_sha256
    assert stamp.preprocessing == images.PREPROCESSING


# Photos


@pytest.fixture(scope="module")
def encoder():
    return Encoder(EncoderConfig("tiny", "random", 32))


@pytest.fixture
def album(tmp_path):
    """Ten photos of noise, with numbers for ids."""
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    examples = []
    for n in range(10):
        path = tmp_path / "photos" / f"{n}.png"
        Image.fromarray(random.integers(0, 256, (40 + n, 40, 3), np.uint8)).save(path)
        examples.append(Example(n, path, ("a photo",), "train"))
    return examples


def test_photos_become_features(tmp_path, encoder, album):
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    told = []
    assert features.add_photos(store, encoder, album, batch_size=4, progress=lambda *done: told.append(done)) == {}
    assert told == [(0, 10), (4, 10), (8, 10), (10, 10)]
    assert set(store.row_of) == set(range(10))
    for example in album:
        expected = encoder(torch.from_numpy(images.load(example.path, 32)[None]))[0]
        found = torch.from_numpy(store.features()[store.row_of[example.image_id]].astype(np.float32))
        assert torch.allclose(found, expected, rtol=2e-3, atol=1e-5)
        assert store.size_of(example.image_id) == example.path.stat().st_size


def test_only_photos_that_are_not_stored_are_computed(tmp_path, encoder, album, monkeypatch):
    seen = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda path, size: seen.append(path) or load(path, size))
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    features.add_photos(store, encoder, album[:3])
    features.add_photos(store, encoder, [*album[1:6], album[4]])  # one of them twice
    assert sorted(seen) == [example.path for example in album[:6]]
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    assert len(store) == 6
    features.add_photos(store, encoder, album[:6])
    assert len(seen) == 6
    album[2].path.unlink()  # its features are there, so that the photo is not missed
    assert features.add_photos(store, encoder, album) == {}
    assert len(seen) == 10


def test_photos_that_cannot_be_read_are_reported_and_not_stored(tmp_path, encoder, album):
    album[3].path.write_bytes(b"no photo")
    album[5].path.unlink()
    album[7].path.write_bytes(album[7].path.read_bytes()[:500])
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    done = []
    failures = features.add_photos(store, encoder, album, batch_size=3, progress=lambda *now: done.append(now))
    assert sorted(failures) == [3, 5, 7]
    assert "3.png: not a photo" in str(failures[3])
    assert "5.png: no such file" in str(failures[5])
    assert "7.png: cannot be decoded" in str(failures[7])
    assert set(FeatureStore(tmp_path / "store", Stamp.of(encoder)).row_of) == {0, 1, 2, 4, 6, 8, 9}
    assert done[-1] == (10, 10)
    Image.new("RGB", (9, 9)).save(album[3].path)
    assert sorted(features.add_photos(store, encoder, album)) == [5, 7]  # tried again, and one of them is mended
    assert 3 in store


def test_another_photo_under_the_same_id(tmp_path, encoder, album):
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    features.add_photos(store, encoder, album[:5])
    before = album[2].path.stat().st_size
    Image.new("RGB", (90, 90)).save(album[2].path)
    after = album[2].path.stat().st_size
    with pytest.raises(FeatureStoreError, match="holds features of another photo with the id 2 ") as caught:
        features.add_photos(store, encoder, album)
    assert f"({before:,} bytes; {album[2].path} has {after:,}); choose another folder" in str(caught.value)
    assert len(store) == 5


def test_a_run_that_is_interrupted_goes_on(tmp_path, encoder, album):
    def interrupt(done, total):
        if done == 4:
            raise KeyboardInterrupt

    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    with pytest.raises(KeyboardInterrupt):
        features.add_photos(store, encoder, album, batch_size=2, progress=interrupt)
    assert len(store) == 4
    store = FeatureStore(tmp_path / "store", Stamp.of(encoder))
    counted = []
    features.add_photos(store, encoder, album, batch_size=2, progress=lambda *now: counted.append(now))
    assert counted[0] == (0, 6)
    whole = FeatureStore(tmp_path / "whole", Stamp.of(encoder))
    features.add_photos(whole, encoder, album, batch_size=2)
    assert np.allclose(store.features(), whole.features(), rtol=2e-3, atol=1e-5)
    assert store.row_of == whole.row_of


def test_reading_needs_no_memory(tmp_path):
    """100,000 rows: the file is mapped, and one row of it read."""
    FeatureStore(tmp_path, STAMP)
    count = 100_000
    with (tmp_path / "features.f16").open("wb") as file:
        file.truncate(count * ROW)  # zeros that take no room
    lines = "".join(json.dumps([n, 1]) + "\n" for n in range(count))
    (tmp_path / "rows.jsonl").write_text(lines)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = FeatureStore(tmp_path, STAMP)
    assert store.features()[count - 1].sum() == 0
    assert store.features()[np.array([5, count - 1, 7])].shape == (3, 4096)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB, of 800 MB


def test_the_default_folder_tells_sets_and_encoders_apart(tmp_path, monkeypatch):
    def annotations(name, *paths):
        examples = tuple(Example(n, Path(path), ("a",), "train") for n, path in enumerate(paths))
        return Annotations(name, (), examples, Problems())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = annotations("flickr8k", "/data/images/1.jpg", "/data/images/2.jpg")
    folder = features.default_folder(here, STAMP)
    assert folder.parent == tmp_path / "captioner/features"
    assert folder.name.startswith("flickr8k-")
    assert folder == features.default_folder(annotations("flickr8k", "/data/images/9.jpg"), STAMP)
    others = {
        features.default_folder(annotations("flickr8k", "/other/images/1.jpg"), STAMP),
        features.default_folder(annotations("flickr30k", "/data/images/1.jpg"), STAMP),
        features.default_folder(here, replace(STAMP, encoder="vgg16")),
        features.default_folder(here, replace(STAMP, weights_sha256="12345678")),
        features.default_folder(here, replace(STAMP, image_size=256)),
    }
    assert len(others | {folder}) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert features.default_folder(here, STAMP).is_relative_to(tmp_path / ".cache/captioner/features")

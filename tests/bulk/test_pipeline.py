"""Many photos are captioned in a stream: in order, in constant memory, and neither a bad nor a slow one stops them."""

import threading
import time
from collections import Counter

import pytest
from fake import Fake, caption, photo

from captioner import images
from captioner.bulk import pipeline
from captioner.bulk.pipeline import Seconds, caption_photos
from captioner.bulk.sources import Item
from captioner.config import DecodingOptions
from captioner.errors import ImageError


@pytest.fixture
def photos(tmp_path):
    """Seven photos; the third and the last cannot be read."""
    paths = [photo(tmp_path / f"{number}.png", number) for number in range(7)]
    paths[2].write_bytes(paths[2].read_bytes()[:45])
    paths[6] = tmp_path / "nothing.png"
    return paths


def items(paths):
    return [Item(str(path), str(path), str(path)) for path in paths]


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_photo_comes_once_and_in_its_place(photos, monkeypatch, chunk, workers):
    monkeypatch.setattr(pipeline, "CHUNK", chunk)
    found = list(caption_photos(Fake(), photos, workers=workers))
    assert [each.path for each in found] == photos
    for number, each in enumerate(found):
        if number in (2, 6):
            assert each.captions == ()
            assert isinstance(each.error, ImageError)
            assert str(each.path) in str(each.error)
        else:
            assert each.error is None
            assert each.captions == (caption(number, 0, 7),)


def test_options_are_passed_on(photos):
    for each in caption_photos(Fake(), photos[:2], DecodingOptions(num_captions=3)):
        assert [one.text[-8:] for one in each.captions[1:]] == ["number 1", "number 2"]


def test_only_bad_photos_and_none(photos):
    found = list(caption_photos(Fake(), [photos[2], photos[6]]))
    assert all(each.error is not None and not each.captions for each in found)
    assert list(caption_photos(Fake(), [])) == []


def test_no_more_photos_are_read_than_are_asked_for(photos, monkeypatch):
    """A million photos are not in memory before the first caption."""
    monkeypatch.setattr(pipeline, "CHUNK", 4)
    taken = 0

    def many():
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            yield photos[0]

    stream = caption_photos(Fake(), many(), workers=2)
    assert next(stream).captions
    stream.close()
    assert taken <= 4 * 4


def test_few_photos_are_divided_equally():
    sizes = lambda count, workers: [len(chunk) for chunk in pipeline._chunks(items(range(count)), workers)]  # noqa: E731
    assert sizes(10, 2) == [5, 5]
    assert sizes(128, 2) == [64, 64]
    assert sizes(250, 2) == [64, 64, 61, 61]
    assert sizes(1, 8) == [1]


def test_photos_in_memory_are_bounded_by_their_bytes(monkeypatch):
    monkeypatch.setattr(pipeline, "_CHUNK_BYTES", 1000)
    large = [Item(str(n), str(n), bytes(400)) for n in range(40)]
    assert max(len(chunk) for chunk in pipeline._chunks(large, 2)) <= 4


def test_a_model_that_one_thread_may_use_is_used_by_one(photos):
    class Alone(Fake):
        concurrent = False
        inside = 0

        def features(self, photos):
            assert not self.inside
            self.inside += 1
            time.sleep(0.002)
            found = super().features(photos)
            self.inside -= 1
            return found

    found = list(caption_photos(Alone(), photos[:2] * 50, workers=6))
    assert all(each.error is None for each in found)


def test_an_error_of_the_model_is_not_hidden(photos):
    class Broken(Fake):
        def describe(self, features, options=None):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(caption_photos(Broken(), photos))


def test_an_error_of_the_source_comes_after_nothing_was_lost():
    def some():
        yield from items("ab")
        raise ImageError("c: the source ends here")

    with pytest.raises(ImageError, match="the source ends here"):
        list(pipeline.caption(Fake(), some()))


def test_a_photo_that_takes_too_long_is_set_aside(photos, monkeypatch):
    """It hangs for ever, as one in a lost network drive does; the others of its chunk are captioned."""
    release = threading.Event()
    load = images.load
    loaded = Counter()

    def hang(source, size, **options):
        loaded[str(source)] += 1
        if str(source).endswith(("1.png", "4.png")):
            release.wait(20)
        return load(source, size, **options)

    monkeypatch.setattr(images, "load", hang)
    monkeypatch.setattr(pipeline, "_LOOK", 0.02)
    began = time.monotonic()
    found = list(caption_photos(Fake(), photos, workers=2, timeout=0.1))
    release.set()
    assert time.monotonic() - began < 15
    assert [each.path for each in found] == photos
    assert [number for number, each in enumerate(found) if each.error] == [1, 2, 4, 6]
    assert str(found[1].error) == f"{photos[1]}: took longer than 0.1 seconds; give more with --timeout"
    assert found[1].error.kind == "timeout"
    assert found[3].captions == (caption(3, 0, 7),)


def test_work_that_is_stopped_finishes_the_chunks_in_hand(photos, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 2)
    stop = []
    found = []
    for item, _ in pipeline.caption(Fake(0.001), items(photos[:2] * 200), workers=2, stopped=lambda: bool(stop)):
        found.append(item)
        if len(found) == 10:
            stop.append(True)
    assert 10 <= len(found) <= 10 + 2 * 4 * 2
    assert [item.image for item in found] == [str(photos[n % 2]) for n in range(len(found))]


def test_seconds_and_hashes(photos):
    import hashlib

    seconds = Seconds()
    results = [result for _, result in pipeline.caption(Fake(0.001), items(photos), hashed=True, seconds=seconds)]
    assert results[0].sha256 == hashlib.sha256(photos[0].read_bytes()).hexdigest()
    assert results[6].sha256 is None
    assert seconds.decode > 0
    assert seconds.features >= 0.004
    assert seconds.search > 0


def test_threads_end_with_the_work(photos):
    before = threading.active_count()
    list(caption_photos(Fake(), photos, workers=3))
    stream = caption_photos(Fake(), photos * 100, workers=3)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before

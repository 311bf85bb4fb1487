"""Many photos are captioned in a stream: in order, in constant memory, and a bad one stops nothing."""

from pathlib import Path

import pytest
import torch
from helpers import isolated, make_model, make_photo  # noqa: F401

from captioner import images
from captioner.bulk.pipeline import Captioned, caption_photos
from captioner.config import DecodingOptions
from captioner.errors import ImageError


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Seven photos; the third and the last cannot be read."""
    paths = [make_photo(tmp_path / f"{number}.png", (30 * number, 255 - 30 * number, 90)) for number in range(7)]
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    paths[6] = tmp_path / "nothing.png"
    return paths


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_each_photo_comes_once_and_in_its_place(photos: list[Path], batch_size: int) -> None:
    model = make_model()
    found = list(caption_photos(model, photos, batch_size=batch_size))
    assert [each.path for each in found] == photos
    assert [number for number, each in enumerate(found) if each.error] == [2, 6]
    for each in found:
        if each.error is None:
            (caption,) = each.captions
            alone = model.caption(each.path)
            assert (caption.text, caption.tokens, caption.finished) == (alone.text, alone.tokens, alone.finished)
            assert caption.logprob == pytest.approx(alone.logprob, abs=0.05)
        else:
            assert each.captions == ()
            assert isinstance(each.error, ImageError)
            assert str(each.path) in str(each.error)
    assert len({each.captions[0].text for each in found if each.captions}) > 1


def test_the_same_photo_may_be_given_twice(photos: list[Path]) -> None:
    found = list(caption_photos(make_model(), [photos[0], photos[2], photos[0]]))
    assert [each.path for each in found] == [photos[0], photos[2], photos[0]]
    assert found[0] == found[2]


def test_options_are_passed_on(photos: list[Path]) -> None:
    options = DecodingOptions(num_captions=3, max_words=2, min_words=2)
    for each in caption_photos(make_model(), photos[:2], options):
        assert len(each.captions) == 3
        assert {len(caption.tokens) for caption in each.captions} == {2}


def test_only_bad_photos_and_none(photos: list[Path]) -> None:
    model = make_model()
    found = list(caption_photos(model, [photos[2], photos[6]]))
    assert all(each.error is not None and not each.captions for each in found)
    assert list(caption_photos(model, [])) == []


def test_no_more_photos_are_read_than_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million photos are not in memory before the first caption."""
    photo = make_photo(tmp_path / "photo.png")
    read: list[object] = []
    load = images.load

    def count(source: Path, size: int) -> torch.Tensor:
        read.append(source)
        return load(source, size)

    monkeypatch.setattr(images, "load", count)
    stream = caption_photos(make_model(), [photo] * 1000, batch_size=2)
    first: Captioned = next(stream)
    assert first.captions
    stream.close()  # type: ignore[attr-defined]
    assert len(read) <= 8

"""Photos that are decoded when they are asked for, as they are or changed anew in every epoch."""

import numpy as np
import pytest
from PIL import Image

from captioner import images
from captioner.datasets.photos import Augmentation, Photos
from captioner.errors import ImageError


@pytest.fixture
def album(tmp_path):
    """Photo n is red on its left half and blue on its right half, as bright as n says."""
    paths = [tmp_path / f"{n:02}.png" for n in range(8)]
    for n, path in enumerate(paths):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32, 0] = pixels[:, 32:, 2] = 100 + 10 * n
        Image.fromarray(pixels).save(path)
    return paths


def test_photos_are_decoded_when_they_are_asked_for(album, monkeypatch):
    decoded = []
    load = images.load
    monkeypatch.setattr(images, "load", lambda path, size: decoded.append(path) or load(path, size))
    photos = Photos(album, 8)
    assert decoded == []
    pixels = photos[np.array([5, 2, 5])]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels[:, 0, 0, 0].tolist() == [150, 120, 150]
    assert np.array_equal(photos.changed(np.array([5, 2, 5]), epoch=3), pixels)  # nothing to change


def test_photos_names_those_that_cannot_be_decoded(album):
    album[3].write_bytes(b"")
    photos = Photos(album, 8)
    failures = photos.check(np.array([1, 3, 5]))
    assert list(failures) == [3]
    assert "03.png: not a photo" in str(failures[3])
    assert photos.check(np.array([0, 2])) == {}
    for look in (lambda rows: photos[rows], lambda rows: photos.changed(rows, 0)):
        with pytest.raises(ImageError, match=r"03\.png: not a photo"):
            look(np.array([1, 3]))


def changed(album, augmentation, epochs=20, seed=0):
    photos = Photos(album, 16, augmentation, seed)
    return np.stack([photos.changed(np.arange(8), epoch) for epoch in range(epochs)])


def test_changes_depend_on_seed_epoch_and_photo_alone(album):
    everything = Augmentation(mirror=True, crop=0.5, colour=0.3)
    first = changed(album, everything)
    assert np.array_equal(first, changed(album, everything))
    assert not np.array_equal(first, changed(album, everything, seed=1))
    assert len({epoch.tobytes() for epoch in first}) == 20
    alone = Photos(album, 16, everything, 0).changed(np.array([6]), 5)  # whoever else is in the batch
    assert np.array_equal(alone[0], first[5, 6])


def test_half_of_the_photos_are_mirrored(album):
    plain = Photos(album, 16)[np.arange(8)]
    seen = changed(album, Augmentation(mirror=True))
    mirrored = (seen == plain[..., ::-1]).all((2, 3, 4))
    assert ((seen == plain).all((2, 3, 4)) ^ mirrored).all()
    assert 0.3 < mirrored.mean() < 0.7


def test_a_crop_shows_a_part_as_large_as_was_asked_for(album):
    """The border between the colours lies elsewhere, but never so far that less than the share is seen."""
    red = (changed(album, Augmentation(crop=0.5))[:, :, 0] > 40).mean((2, 3))
    assert red.std() > 0.05
    assert red.min() > 0.5 * 0.5 * 0.5
    assert np.array_equal(changed(album, Augmentation(crop=1.0)), changed(album, None))


def test_colours_change_by_the_share_at_most(album):
    plain = Photos(album, 16)[np.arange(8)].astype(float)
    seen = changed(album, Augmentation(colour=0.2)).astype(float)
    brightness = seen.mean((2, 3, 4)) / plain.mean((1, 2, 3))
    assert brightness.std() > 0.05
    assert 0.6 < brightness.min() < brightness.max() < 1.5  # three changes together


def test_a_damaged_photo_is_named_through_all_changes(album):
    album[2].write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"02\.png: not a photo"):
        Photos(album, 16, Augmentation(crop=0.5)).changed(np.array([2]), 0)

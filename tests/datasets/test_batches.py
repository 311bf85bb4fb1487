"""Every caption is seen once an epoch, with its photo, in an order that can be repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.datasets.annotations import Example
from captioner.datasets.batches import CaptionDataset
from captioner.images import Photos
from captioner.vocabulary import Vocabulary

PHOTOS = 23


def examples(photos=PHOTOS):
    """Photo n has 1 to 4 captions, of 1 to 12 words; every caption names its photo and itself."""
    random = np.random.default_rng(0)
    return [
        Example(
            image_id=n,
            path=Path(f"{n}.png"),
            captions=tuple(" ".join([f"p{n}c{c}", *["word"] * random.integers(12)]) for c in range(n % 4 + 1)),
            split="train",
        )
        for n in range(photos)
    ]


VOCABULARY = Vocabulary.build((caption for example in examples() for caption in example.captions), 1)
CAPTIONS = sorted(caption.split()[0] for example in examples() for caption in example.captions)
ROWS = np.random.default_rng(1).permutation(PHOTOS + 5)[:PHOTOS]  # where the features of each photo are


def source():
    """Features that say in which row they are."""
    return np.repeat(np.arange(PHOTOS + 5, dtype=np.float16)[:, None], 4096, axis=1)


@pytest.fixture(scope="module")
def dataset():
    return CaptionDataset(examples(), VOCABULARY, source(), ROWS)


def names(batch):
    """The first word of each caption: its name."""
    return [VOCABULARY.words(ids)[0] for ids in batch.tokens.tolist()]


def photo_of(name):
    return int(name[1:].split("c")[0])


def epoch(dataset, number=0, **options):
    return list(dataset.epoch(number, **{"batch_size": 8, "seed": 0} | options))


@pytest.mark.parametrize("by_photo", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 1000])
def test_every_caption_once_an_epoch(dataset, batch_size, by_photo):
    assert len(dataset) == len(CAPTIONS)
    for number in range(2):
        batches = epoch(dataset, number, batch_size=batch_size, by_photo=by_photo)
        assert sorted(name for batch in batches for name in names(batch)) == CAPTIONS
        assert len(batches) == dataset.steps(batch_size)
        assert all(len(batch.tokens) <= batch_size for batch in batches)
        assert sum(len(batch.tokens) < batch_size for batch in batches) <= 1


@pytest.mark.parametrize("by_photo", [False, True])
def test_every_caption_has_its_photo(dataset, by_photo):
    for batch in epoch(dataset, by_photo=by_photo):
        assert batch.photos.dtype == torch.float32
        assert batch.photos.shape[1] == 4096
        rows = batch.photos[batch.photo, 0].tolist()
        assert rows == [ROWS[photo_of(name)] for name in names(batch)]
        assert len(set(batch.photos[:, 0].tolist())) == len(batch.photos)  # each photo once


@pytest.mark.parametrize("by_photo", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(dataset, by_photo):
    def order(number, seed):
        return [names(batch) for batch in epoch(dataset, number, seed=seed, by_photo=by_photo)]

    first = order(3, 1)
    np.random.seed(9)  # what others draw has no influence
    torch.manual_seed(9)
    again = CaptionDataset(examples(), VOCABULARY, source(), ROWS)
    assert [names(batch) for batch in epoch(again, 3, seed=1, by_photo=by_photo)] == first
    assert order(4, 1) != first
    assert order(3, 2) != first
    assert sorted(map(sorted, order(4, 1))) != sorted(map(sorted, first))  # other captions come together


@pytest.mark.parametrize("by_photo", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_share_each_step(dataset, processes, by_photo):
    shares = [
        epoch(dataset, batch_size=4, rank=rank, processes=processes, by_photo=by_photo) for rank in range(processes)
    ]
    alone = epoch(dataset, batch_size=4 * processes, by_photo=by_photo)
    assert {len(share) for share in shares} == {len(alone)} == {dataset.steps(4, processes)}
    for step, whole in zip(zip(*shares, strict=True), alone, strict=True):
        together = [name for batch in step for name in names(batch)]
        assert set(together) == set(names(whole))
        # None twice, unless there are fewer captions than processes, all of which must take part.
        assert len(together) == max(len(names(whole)), processes)
        sizes = [len(batch.tokens) for batch in step]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("processes", [1, 3])
def test_by_photo_keeps_the_captions_of_a_photo_together(dataset, processes):
    seen = [
        photo
        for rank in range(processes)
        for batch in epoch(dataset, batch_size=16, rank=rank, processes=processes, by_photo=True)
        for photo in {photo_of(name) for name in names(batch)}
    ]
    edges = dataset.steps(16, processes) * processes - 1  # where a photo's captions may be divided
    assert PHOTOS <= len(seen) <= PHOTOS + edges
    photos = [photo for batch in epoch(dataset, batch_size=16, by_photo=True) for photo in batch.photo.tolist()]
    assert len(photos) == len(CAPTIONS)
    sorted_by_length = sum(len(batch.photos) for batch in epoch(dataset, batch_size=16))
    assert sum(len(batch.photos) for batch in epoch(dataset, batch_size=16, by_photo=True)) < sorted_by_length


def test_batches_hold_captions_of_like_length(dataset):
    def padding(batches):
        return sum(batch.tokens.numel() - int(batch.lengths.sum()) for batch in batches)

    assert padding(epoch(dataset)) < 0.5 * padding(epoch(dataset, by_photo=True))


def test_tokens_inputs_and_targets():
    texts = ("a dog runs", "a", "a dog")
    vocabulary = Vocabulary.build(texts, 1)
    examples = [Example("x", Path("x.png"), texts[:2], "train"), Example("y", Path("y.png"), texts[2:], "train")]
    batch = CaptionDataset(examples, vocabulary, source(), np.array([4, 2])).batch(np.array([2, 0, 1]))
    a, dog, runs = (vocabulary.id_of(word) for word in ("a", "dog", "runs"))
    start, end, pad = vocabulary.start, vocabulary.end, vocabulary.pad
    assert batch.tokens.tolist() == [
        [start, a, dog, end, pad],
        [start, a, dog, runs, end],
        [start, a, end, pad, pad],
    ]
    assert batch.tokens.dtype == batch.lengths.dtype == batch.photo.dtype == torch.int64
    assert batch.lengths.tolist() == [4, 5, 3]
    assert batch.photos[:, 0].tolist() == [2, 4]
    assert batch.photo.tolist() == [0, 1, 1]
    assert batch.inputs.tolist() == [[start, a, dog, end], [start, a, dog, runs], [start, a, end, pad]]
    assert batch.keep.tolist() == [[True, True, True, False], [True] * 4, [True, True, False, False]]
    assert batch.targets.tolist() == [a, dog, end, a, dog, runs, end, a, end]  # each word and each end, no padding
    assert len(batch.targets) == int(batch.keep.sum()) == int((batch.lengths - 1).sum())


def test_long_captions_are_cut_and_do_not_learn_to_end(dataset):
    short = CaptionDataset(examples(), VOCABULARY, source(), ROWS, max_words=3)
    assert len(short) == len(dataset)
    for batch in epoch(short, batch_size=1000):
        assert batch.lengths.max() <= 5
        for ids, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            assert len(VOCABULARY.words(ids)) <= 3
            assert (ids[length - 1] == VOCABULARY.end) == (len(VOCABULARY.words(ids)) == length - 2)
        assert (batch.targets == VOCABULARY.end).sum() < len(batch.tokens)


def test_batches_move_to_a_device(dataset):
    batch = epoch(dataset)[0]
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.photos, moved.photo, moved.tokens, moved.lengths)} == {"meta"}
    assert moved.tokens.shape == batch.tokens.shape


def test_features_that_are_mapped_from_disk(tmp_path, dataset):
    source().tofile(tmp_path / "features.f16")
    mapped = np.memmap(tmp_path / "features.f16", np.float16, mode="r", shape=(PHOTOS + 5, 4096))
    on_disk = CaptionDataset(examples(), VOCABULARY, mapped, ROWS)
    for batch, expected in zip(epoch(on_disk), epoch(dataset), strict=True):
        assert torch.equal(batch.photos, expected.photos)
        batch.photos.add_(1)  # a copy: the file stays as it is
    assert np.array_equal(mapped, source())


def test_photos_instead_of_features(tmp_path):
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (n, n, n)).save(path)
    dataset = CaptionDataset(examples(4), VOCABULARY, Photos(paths, 8), np.arange(4))
    for batch in epoch(dataset, by_photo=True):
        assert batch.photos.dtype == torch.uint8
        assert batch.photos.shape[1:] == (3, 8, 8)
        assert batch.photos[batch.photo, 0, 0, 0].tolist() == [photo_of(name) for name in names(batch)]

"""Every caption is seen once an epoch, with its photo, in an order that can be repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch

from captioner.datasets.annotations import Example
from captioner.datasets.batches import CaptionDataset, Share
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


@pytest.fixture(scope="module")
def dataset():
    return CaptionDataset.of(examples(), VOCABULARY, ROWS)


def names(batch):
    """The first word of each caption: its name."""
    return [VOCABULARY.words(ids)[0] for ids in batch.tokens.tolist()]


def photo_of(name):
    return int(name[1:].split("c")[0])


def epoch(dataset, number=0, **options):
    return [dataset.batch(share) for share in dataset.epoch(number, **{"batch_size": 8, "seed": 0} | options)]


@pytest.mark.parametrize("by_photo", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 8, 1000])
def test_every_caption_once_an_epoch(dataset, batch_size, by_photo):
    assert len(dataset) == len(CAPTIONS)
    for number in range(2):
        batches = epoch(dataset, number, batch_size=batch_size, by_photo=by_photo)
        assert sorted(name for batch in batches for name in names(batch)) == CAPTIONS
        assert len(batches) == dataset.batches(batch_size)
        assert all(len(batch.tokens) <= batch_size for batch in batches)
        assert sum(len(batch.tokens) < batch_size for batch in batches) <= 1


@pytest.mark.parametrize("by_photo", [False, True])
def test_every_caption_has_its_photo(dataset, by_photo):
    for batch in epoch(dataset, by_photo=by_photo):
        assert batch.rows[batch.photo].tolist() == [ROWS[photo_of(name)] for name in names(batch)]
        assert len(set(batch.rows.tolist())) == len(batch.rows)  # each photo once


@pytest.mark.parametrize("by_photo", [False, True])
def test_the_order_is_a_function_of_seed_and_epoch(dataset, by_photo):
    def order(number, seed):
        return [names(batch) for batch in epoch(dataset, number, seed=seed, by_photo=by_photo)]

    first = order(3, 1)
    np.random.seed(9)  # what others draw has no influence
    torch.manual_seed(9)
    again = CaptionDataset.of(examples(), VOCABULARY, ROWS)
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
    assert {len(share) for share in shares} == {len(alone)} == {dataset.batches(4, processes)}
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
    edges = dataset.batches(16, processes) * processes - 1  # where a photo's captions may be divided
    assert PHOTOS <= len(seen) <= PHOTOS + edges
    photos = [photo for batch in epoch(dataset, batch_size=16, by_photo=True) for photo in batch.photo.tolist()]
    assert len(photos) == len(CAPTIONS)
    sorted_by_length = sum(len(batch.rows) for batch in epoch(dataset, batch_size=16))
    assert sum(len(batch.rows) for batch in epoch(dataset, batch_size=16, by_photo=True)) < sorted_by_length


def test_batches_hold_captions_of_like_length(dataset):
    def padding(batches):
        return sum(batch.inputs.numel() - len(batch.keep) for batch in batches)

    assert padding(epoch(dataset)) < 0.5 * padding(epoch(dataset, by_photo=True))


def test_tokens_inputs_and_targets():
    texts = ("a dog runs", "a", "a dog")
    vocabulary = Vocabulary.build(texts, 1)
    examples = [Example("x", Path("x.png"), texts[:2], "train"), Example("y", Path("y.png"), texts[2:], "train")]
    batch = CaptionDataset.of(examples, vocabulary, np.array([4, 2])).batch(Share(0, np.array([2, 0, 1]), 0.5))
    a, dog, runs = (vocabulary.id_of(word) for word in ("a", "dog", "runs"))
    start, end, pad = vocabulary.start, vocabulary.end, vocabulary.pad
    assert batch.tokens.tolist() == [
        [start, a, dog, end, pad],
        [start, a, dog, runs, end],
        [start, a, end, pad, pad],
    ]
    assert {tensor.dtype for tensor in batch.tensors()} == {torch.int64}
    assert batch.rows.tolist() == [2, 4]
    assert batch.weight == 0.5
    assert batch.photo.tolist() == [0, 1, 1]
    assert batch.inputs.tolist() == [[start, a, dog, end], [start, a, dog, runs], [start, a, end, pad]]
    assert batch.keep.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]  # of 3 rows of 4, those before a real token
    assert batch.targets.tolist() == [a, dog, end, a, dog, runs, end, a, end]  # each word and each end, no padding


def test_long_captions_are_cut_and_do_not_learn_to_end(dataset):
    short = CaptionDataset.of(examples(), VOCABULARY, ROWS, max_words=3)
    assert len(short) == len(dataset)
    for batch in epoch(short, batch_size=1000):
        assert batch.tokens.shape[1] <= 5
        for ids in batch.tokens.tolist():
            assert len(VOCABULARY.words(ids)) <= 3
        assert (batch.targets == VOCABULARY.end).sum() < len(batch.tokens)


def test_batches_move_to_a_device(dataset):
    batch = epoch(dataset)[0]
    moved = batch.to(torch.device("meta"))
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"}
    assert len(moved.tensors()) == len(batch.tensors()) == 5
    assert moved.tokens.shape == batch.tokens.shape


@pytest.mark.parametrize("by_photo", [False, True])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_words_of_a_step_count_alike(dataset, processes, accumulate, by_photo):
    """The losses of all words, so weighed and averaged over processes, are the mean over the words of the step."""
    options = {"batch_size": 4, "seed": 0, "processes": processes, "by_photo": by_photo, "accumulate": accumulate}
    plans = [dataset.epoch(0, rank=rank, **options) for rank in range(processes)]
    words = sum(len(batch.targets) for batch in epoch(dataset))
    assert sum(len(dataset.batch(share).targets) for plan in plans for share in plan if share.weight) == words
    for start in range(0, len(plans[0]), accumulate):
        step = [share for plan in plans for share in plan[start : start + accumulate]]
        total = sum(len(dataset.batch(share).targets) * share.weight for share in step) / processes
        assert total == pytest.approx(1)
        assert len({share.weight for share in step if share.weight}) == 1


def test_batches_that_a_run_has_had_are_left_out(dataset):
    options = {"batch_size": 4, "seed": 0, "accumulate": 2}
    whole, rest = dataset.epoch(1, **options), dataset.epoch(1, first=6, **options)
    assert [(s.captions.tolist(), s.weight) for s in rest] == [(s.captions.tolist(), s.weight) for s in whole[6:]]

"""The search is compared with searches that are too slow to use and too plain to be wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from searches import (
    LARGE,
    SPECIAL,
    Table,
    check_rules,
    everything,
    logprobs,
    models,
    photos,
    plain_beam,
    random_photos,
    same,
    searches,
    ways,
)

from captioner.config import DecodingOptions
from captioner.decoding import search
from captioner.decoding.search import Hypothesis, decode
from captioner.errors import CaptionerError


@settings(max_examples=25, deadline=None)
@given(models, st.integers(0, 900), searches, st.integers(1, 5))
def test_beam_as_wide_as_the_tree_equals_brute_force(model, photo, given_options, num_captions):
    options = DecodingOptions(beam_size=400, num_captions=num_captions, **given_options)
    expected = sorted(everything(model, photo, options), key=lambda o: -o.score(options))
    same(decode(model, photos(photo), SPECIAL, options)[0], expected, options)


@settings(max_examples=60, deadline=None)
@given(models, st.lists(st.integers(0, 900), min_size=1, max_size=4), searches, st.integers(1, 4), st.integers(1, 4))
# A beam that can no longer win takes places from worse ones; without it the search would be over too soon.
@example(
    Table(5, 7, 4.0),
    [0],
    {
        "max_words": 1,
        "min_words": 0,
        "length_normalisation": "average",
        "no_repeat_ngram": 0,
        "unique_words": False,
        "forbidden_words": (),
    },
    3,
    1,
)
def test_beam_equals_a_plain_beam_search_of_each_photo(model, numbers, given_options, beam_size, num_captions):
    options = DecodingOptions(beam_size=beam_size, num_captions=num_captions, **given_options)
    options = replace(options, max_words=options.max_words + 4)
    for photo, found in zip(numbers, decode(model, photos(*numbers), SPECIAL, options), strict=True):
        expected = plain_beam(model, photo, options)
        # The plain search goes on where no better caption can be found; what it finds there is not asked for.
        same(found, expected, options)


@settings(max_examples=40, deadline=None)
@given(models, st.integers(0, 900), st.integers(0, 3), st.integers(3, 8))
def test_beam_of_one_is_greedy(model, photo, min_words, max_words):
    tokens, finished = (), False
    while len(tokens) < max_words and not finished:
        following = logprobs(model, photo, tokens)
        choices = SPECIAL.ids(model.size) + [SPECIAL.end] * (len(tokens) >= min_words)
        word = max(choices, key=lambda i: following[i])
        finished = word == SPECIAL.end
        tokens = tokens if finished else (*tokens, word)
    options = DecodingOptions(beam_size=1, min_words=min_words, max_words=max_words, length_normalisation="average")
    (found,) = decode(model, photos(photo), SPECIAL, options)[0]
    assert (found.tokens, found.finished) == (tokens, finished)


@pytest.mark.parametrize("way", ways)
def test_batch_equals_its_singles_bit_for_bit(way):
    options = DecodingOptions(max_words=12, **ways[way])
    features = random_photos(12, 1)
    together = decode(LARGE, features, SPECIAL, options)
    assert together == [decode(LARGE, photo[None], SPECIAL, options)[0] for photo in features]
    order = np.random.default_rng(2).permutation(12)
    assert [together[i] for i in order] == decode(LARGE, features[order], SPECIAL, options)


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("sharpness", [0.0, 1e-30])
def test_equally_likely_words_are_chosen_alike_in_any_batch(way, sharpness):
    """Of equals, those that continue the earlier caption come first, and of those the word with the lower id."""
    model = Table(3, sharpness=sharpness)
    options = DecodingOptions(max_words=5, min_words=2, **{"no_repeat_ngram": 2, **ways[way]})
    features = random_photos(9, 1)
    together = decode(model, features, SPECIAL, options)
    assert together == [decode(model, photo[None], SPECIAL, options)[0] for photo in features]
    if way == "greedy":
        assert {h[0].tokens for h in together} == {(3, 3)}  # then the end is as likely, and competes


@pytest.mark.parametrize("way", ways)
def test_parts_and_workers_change_nothing(way, monkeypatch):
    options = DecodingOptions(max_words=12, **ways[way])
    features = random_photos(11, 1)
    expected = decode(LARGE, features, SPECIAL, options)
    monkeypatch.setattr(search, "_ROWS", 16)
    monkeypatch.setattr(search, "_ROWS_WORKER", 2)
    for workers in (1, 2, 3, 50):
        assert decode(LARGE, features, SPECIAL, options, workers) == expected


def test_every_worker_has_its_part():
    class Counted(Table):
        def start(self, features):
            counts.append(len(features))
            return super().start(features)

    def counted(photos, workers):
        counts.clear()
        decode(Counted(), random_photos(photos), SPECIAL, DecodingOptions(beam_size=4, max_words=1), workers)
        return sorted(counts)

    counts = []
    assert counted(300, 1) == [60] * 5  # of 240 rows
    assert counted(300, 3) == [50] * 6
    assert counted(30, 3) == [15, 15]  # 60 rows each: fewer are not worth a worker
    assert counted(2, 3) == [2]
    assert counted(0, 3) == []


def test_words_are_refused_where_there_is_no_photo():
    for name in ("required_words", "forbidden_words"):
        with pytest.raises(CaptionerError, match=name):
            decode(Table(), photos(), SPECIAL, DecodingOptions(**{name: ("",)}))


def test_what_goes_wrong_in_a_worker_is_told():
    class Wrong(Table):
        def read(self, tokens, state):
            raise RuntimeError("no logits today")

    with pytest.raises(RuntimeError, match="no logits today"):
        decode(Wrong(), photos(*range(90)), SPECIAL, DecodingOptions(), 2)


def test_beams_that_are_over_cost_nothing():
    model = Table(sharpness=0.0)
    model.logits[:, SPECIAL.end] = 30.0  # ends as soon as it may
    options = DecodingOptions(beam_size=4, min_words=2, max_words=20)
    decode(model, photos(1, 2, 3), SPECIAL, options)
    assert model.rows == 3 * (1 + 4 + 4)


# Models that misbehave


ALL_WAYS = [
    {"beam_size": 1},
    {"beam_size": 3},
    {"beam_size": 4, "beam_groups": 2, "num_captions": 2},
    {"method": "sample", "num_captions": 2},
    {"required_words": ("a",)},
]


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("from_word", [0, 2])
def test_a_model_that_breaks_cuts_the_caption(way, value, from_word):
    class Broken(Table):
        def begin(self, features):
            return np.stack([super().begin(features), np.zeros(len(features), np.int64)], axis=1)

        def read(self, tokens, state):
            logits, code = super().read(tokens, state[:, 0])
            logits[:, SPECIAL.end] = -np.inf
            logits[state[:, 1] >= from_word] = value
            return logits, np.stack([code, state[:, 1] + 1], axis=1)

    found = decode(Broken(), photos(1, 2), SPECIAL, DecodingOptions(**way))
    assert [len(f) > 0 for f in found] == [True, True]
    for hypothesis in (h for f in found for h in f):
        assert len(hypothesis.tokens) == from_word
        assert not hypothesis.finished
        assert math.isfinite(hypothesis.logprob)
        assert hypothesis.satisfied == ("required_words" not in way)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_a_model_that_never_ends_is_cut(way):
    model = Table()
    model.logits[:, SPECIAL.end] = -np.inf
    for found in decode(model, photos(1, 2), SPECIAL, DecodingOptions(max_words=7, **way)):
        assert all(len(h.tokens) == 7 and not h.finished and h.satisfied for h in found)


@pytest.mark.parametrize("way", ALL_WAYS[:4], ids=str)
@pytest.mark.parametrize("min_words", [0, 1, 3])
def test_a_model_that_ends_at_once_writes_what_it_must(way, min_words):
    model = Table()
    model.logits[:, SPECIAL.end] = 60.0
    for found in decode(model, photos(1, 2), SPECIAL, DecodingOptions(min_words=min_words, **way)):
        assert len(found[0].tokens) == min_words
        assert found[0].finished


def test_a_model_without_words_left_is_cut():
    options = DecodingOptions(no_repeat_ngram=1, min_words=9, max_words=12)
    (found,) = decode(Table(), photos(1), SPECIAL, options)[0]
    assert len(found.tokens) == 8  # all the words there are
    assert not found.finished


def test_only_the_special_words_are_likely():
    model = Table()
    model.logits[:, [SPECIAL.pad, SPECIAL.start, SPECIAL.unk]] += 40
    (found,) = decode(model, photos(1), SPECIAL, DecodingOptions())[0]
    check_rules(found, DecodingOptions())
    assert found.tokens


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_a_favourite_may_be_forbidden_however_likely_it_is(way):
    """The others have probabilities that no floating point number can tell from 0."""

    class Certain(Table):
        def read(self, tokens, state):
            logits, state = super().read(tokens, state)
            logits[:, SPECIAL.encode(["h"])[0][1]] += 500
            return logits, state

    options = DecodingOptions(forbidden_words=("h",), max_words=6, min_words=6, **way)
    for found in decode(Certain(), photos(1, 2), SPECIAL, options):
        for hypothesis in found:
            check_rules(hypothesis, options)
            assert len(hypothesis.tokens) == 6
            assert hypothesis.satisfied
            assert hypothesis.logprob == pytest.approx(6 * -500, rel=0.02)


def test_no_photos():
    assert decode(Table(), photos(), SPECIAL, DecodingOptions()) == []


def test_fewer_captions_where_there_are_no_more():
    found = decode(Table(size=7), photos(1), SPECIAL, DecodingOptions(num_captions=50, max_words=1))[0]
    assert sorted(h.tokens for h in found) == [(3,), (4,), (6,)]
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert all(isinstance(h, Hypothesis) for h in found)


@pytest.mark.parametrize(
    ("given_options", "match"),
    [
        ({"beam_size": 0}, "beam_size is 0; expected 1 to 1000"),
        ({"num_captions": 0}, "num_captions is 0; expected 1 to 1000"),
        ({"min_words": -1}, "min_words is -1; expected 0 or more"),
        ({"min_words": 30}, "min_words is 30 and max_words 20"),
        ({"temperature": 0.0}, "temperature is 0.0; expected 0.001 to 1000"),
        ({"temperature": math.nan}, "temperature is nan; expected 0.001 to 1000"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a probability"),
        ({"diversity": -1.0}, "diversity is -1.0"),
        ({"beam_size": 5, "beam_groups": 2}, "does not divide the beam of 5"),
        ({"method": "magic"}, "method is 'magic'; expected one of beam, sample"),
        ({"method": "sample", "required_words": ("a",)}, 'need method "beam"'),
        ({"method": "sample", "beam_groups": 3}, 'beam_groups need method "beam"'),
    ],
)
def test_options_that_cannot_be_meant(given_options, match):
    with pytest.raises(CaptionerError, match=match):
        DecodingOptions(**given_options)

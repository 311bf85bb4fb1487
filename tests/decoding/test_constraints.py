"""What captions must have and must not have."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import (
    SPECIAL,
    Table,
    check_rules,
    everything,
    has,
    models,
    photos,
    same,
    searches,
)

from captioner.config import DecodingOptions
from captioner.decoding.search import decode
from captioner.errors import CaptionerError


@settings(max_examples=40, deadline=None)
@given(
    models, st.integers(0, 900), st.lists(st.sampled_from(["a", "b", "a b", "b a", "c|b b"]), min_size=1, max_size=2)
)
def test_wide_constrained_beam_equals_brute_force(model, photo, required):
    options = DecodingOptions(beam_size=400, num_captions=3, max_words=4, required_words=tuple(required))
    expected = [
        outcome
        for outcome in everything(model, photo, options)
        if all(any(has(outcome.tokens, p) for p in entry.split("|")) for entry in required)
    ]
    if not expected:
        with pytest.raises(CaptionerError, match="room for them"):
            decode(model, photos(photo), SPECIAL, options)
        return
    found = decode(model, photos(photo), SPECIAL, options)[0]
    assert all(h.satisfied for h in found)
    same(found, sorted(expected, key=lambda o: -o.score(options)), options)


@settings(max_examples=60, deadline=None)
@given(
    models,
    st.lists(st.integers(0, 900), min_size=1, max_size=3),
    st.lists(st.sampled_from(["a", "b", "c", "a b", "b c a", "c|b b"]), min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(1, 3),
)
def test_required_words_are_there_or_the_result_says_not(model, numbers, required, no_repeat, beam_size):
    options = DecodingOptions(
        beam_size=beam_size, max_words=9, required_words=tuple(required), no_repeat_ngram=no_repeat, num_captions=2
    )
    for found in decode(model, photos(*numbers), SPECIAL, options):
        assert found
        for hypothesis in found:
            met = all(any(has(hypothesis.tokens, p) for p in entry.split("|")) for entry in required)
            assert met or not hypothesis.satisfied
            if not no_repeat:
                assert hypothesis.satisfied
            check_rules(hypothesis, options)


@settings(max_examples=60, deadline=None)
@given(
    models,
    searches,
    st.sampled_from([{}, {"beam_size": 4, "beam_groups": 2}, {"method": "sample", "num_captions": 4}]),
    st.integers(2, 6),
)
def test_rules_hold_in_every_search(model, given_options, way, min_words):
    options = DecodingOptions(**{**given_options, **way, "max_words": 8, "min_words": min_words})
    for found in decode(model, photos(1, 2), SPECIAL, options):
        for hypothesis in found:
            check_rules(hypothesis, options)


def test_a_word_that_the_model_rules_out_cannot_be_required():
    model = Table()
    model.logits[:, SPECIAL.encode(["a"])[0][1]] = -np.inf
    free = decode(model, photos(1, 2), SPECIAL, DecodingOptions())
    found = decode(model, photos(1, 2), SPECIAL, DecodingOptions(required_words=("a",)))
    assert found == [[replace(h, satisfied=False) for h in captions] for captions in free]


def test_required_words_that_cannot_be():
    def refuse(match, special=SPECIAL, **given_options):
        with pytest.raises(CaptionerError, match=match):
            decode(Table(), photos(1), special, DecodingOptions(**given_options))

    refuse("lacks 'zebra'", required_words=("zebra",))
    refuse("'a' is among required_words and forbidden_words", required_words=("a",), forbidden_words=("a",))
    refuse("are 3 words and max_words is 2", required_words=("a b c",), max_words=2)
    refuse("too many to search for together", required_words=tuple("abcdefgh") * 2)
    refuse("'' has no word", required_words=("",))
    refuse("'a b' is 2 words", forbidden_words=("a b",))
    refuse("expected a Vocabulary", special=Ids(), forbidden_words=("a",))


class Ids:
    pad, start, end, unk = 5, 1, 2, 0

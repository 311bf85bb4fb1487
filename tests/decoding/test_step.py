"""The likeliest words, and ensembles."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import LARGE, SPECIAL, Table, logprobs, photos, random_photos

from captioner.config import DecodingOptions
from captioner.decoding.search import decode
from captioner.decoding.step import Ensemble, largest, likeliest


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 3, 511, 512, 513, 2048, 9487]),
    st.integers(1, 80),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 1000),
)
def test_largest_of_equals_are_the_first(rows, size, count, distinct, seed):
    generator = np.random.default_rng(seed)
    values = generator.integers(0, distinct, (rows, size)).astype(np.float32)
    values[generator.random((rows, size)) < 0.1] = -np.inf
    found = largest(values, count)
    for row, columns in zip(values.tolist(), found.tolist(), strict=True):
        assert columns == sorted(range(size), key=lambda c: (-row[c], c))[:count]


def test_rows_without_numbers_stay_so():
    logprob = np.full((2, 2100), np.nan, np.float32)
    logprob[1] = -np.arange(2100)
    found = likeliest(logprob, 3, np.array([7, 5]))
    assert np.isnan(found.logprob[0]).all()
    assert np.isnan(found.named[0]).all()
    assert found.word[1].tolist() == [0, 1, 2]
    assert found.logprob[1].tolist() == [0, -1, -2]
    assert found.named[1].tolist() == [-7, -5]


def test_ensemble_averages_probabilities():
    one, two = Table(1, size=7), Table(2, size=7)
    options = DecodingOptions(beam_size=2, max_words=1, min_words=0, num_captions=9)
    found = decode(Ensemble([one, two]), photos(4), SPECIAL, options)[0]
    mean = [(math.exp(a) + math.exp(b)) / 2 for a, b in zip(logprobs(one, 4, ()), logprobs(two, 4, ()), strict=True)]
    assert len(found) == 4
    for hypothesis in found:
        word = hypothesis.tokens[0] if hypothesis.tokens else SPECIAL.end
        assert hypothesis.logprob == pytest.approx(math.log(mean[word]), abs=1e-5)


@pytest.mark.parametrize("method", ["beam", "sample"])
def test_ensemble_of_one_model_twice_is_the_model(method):
    features, options = random_photos(4), DecodingOptions(method, max_words=8)
    twice, once = (decode(m, features, SPECIAL, options) for m in (Ensemble([LARGE, LARGE]), LARGE))
    assert [h[0].tokens for h in twice] == [h[0].tokens for h in once]


def test_a_probability_may_be_too_small_for_its_type():
    one, two = Table(1), Table(1)
    one.logits[:, 3] = two.logits[:, 3] = -500
    one.logits[:, 4] = two.logits[:, 4] = -np.inf
    both, _ = Ensemble([one, two]).step_all(np.array([1]), np.array([0]), (np.array([2]), np.array([2])))
    assert both[0].tolist() == pytest.approx(logprobs(one, 2, ()), rel=1e-5)


def test_ensemble_has_no_numbers_where_a_member_has_none():
    one, two = Table(1), Table(2)
    two.logits[:] = np.nan
    (hypothesis,) = decode(Ensemble([one, two]), photos(4), SPECIAL, DecodingOptions())[0]
    assert (hypothesis.tokens, hypothesis.finished) == ((), False)


def test_ensemble_needs_one_vocabulary():
    with pytest.raises(ValueError, match="know 7 and 8 words"):
        Ensemble([Table(size=7), Table(size=8)])
    with pytest.raises(ValueError, match="there is no model"):
        Ensemble([])

"""Sampling."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from searches import LARGE, SIZE, SPECIAL, Table, everything, logprobs, photos, random_photos

from captioner.config import DecodingOptions
from captioner.decoding.sampling import _uniform
from captioner.decoding.search import decode


def chi_square_is_plausible(counts, expected):
    """Pearson's statistic lies below its 99.99 % quantile (Wilson & Hilferty 1931)."""
    big = {key for key, count in expected.items() if count >= 5}
    pairs = [(counts[key], expected[key]) for key in big]
    rest = sum(expected.values()) - sum(e for _, e in pairs)
    if rest >= 5:
        pairs.append((sum(counts.values()) - sum(c for c, _ in pairs), rest))
    statistic = sum((c - e) ** 2 / e for c, e in pairs)
    k = len(pairs) - 1
    assert statistic < k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3
    return k


@pytest.mark.parametrize("seed", range(3))
def test_samples_are_as_frequent_as_the_model_says(seed):
    model, count = Table(seed, size=7), 20_000
    options = DecodingOptions(method="sample", num_captions=count, max_words=3, min_words=0, seed=seed)
    found = decode(model, photos(seed), SPECIAL, options)[0]
    assert len(found) == count
    outcomes = everything(model, seed, options)
    # What is never written is left out of every draw, which changes the odds of a caption by those of its prefixes.
    expected = {}
    for outcome in outcomes:
        odds = outcome.logprob
        for n in range(len(outcome.tokens) + outcome.finished):
            following = logprobs(model, seed, outcome.tokens[:n])
            odds -= math.log(sum(math.exp(following[i]) for i in [*SPECIAL.ids(7), SPECIAL.end]))
        expected[outcome.tokens, outcome.finished] = count * math.exp(odds)
    assert sum(expected.values()) == pytest.approx(count)
    assert chi_square_is_plausible(Counter((h.tokens, h.finished) for h in found), expected) > 10
    model_says = {(o.tokens, o.finished): o.logprob for o in outcomes}
    assert all(h.logprob == pytest.approx(model_says[h.tokens, h.finished], abs=1e-4) for h in found[:50])


def kept_words(probabilities, *, temperature=1.0, top_k=0, top_p=1.0):
    """What sampling may draw, and how often, from its definition."""

    def rescaled(kept):
        return {w: p / sum(kept.values()) for w, p in kept.items()}

    def reaching(kept, order, mass):
        reached = itertools.accumulate(kept[w] for w in order)
        count = next(i for i, r in enumerate(reached) if r >= mass) + 1 if mass < 1 else len(order)
        return rescaled({w: kept[w] for w in order[:count]})

    kept = rescaled({w: p ** (1 / temperature) for w, p in probabilities.items()})
    likeliest = sorted(kept, key=lambda w: -kept[w])
    kept = rescaled({w: kept[w] for w in likeliest[: top_k or None]})
    return reaching(kept, sorted(kept, key=kept.get, reverse=True), top_p)


@pytest.mark.parametrize(
    "narrow",
    [
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
        {"top_k": 50},
    ],
    ids=str,
)
def test_narrowed_samples_are_as_frequent_as_defined(narrow):
    model, count = Table(5), 20_000
    options = DecodingOptions(method="sample", num_captions=count, max_words=1, min_words=1, **narrow)
    found = decode(model, photos(3), SPECIAL, options)[0]
    following = logprobs(model, 3, ())
    expected = kept_words({w: math.exp(following[w]) for w in SPECIAL.ids(SIZE)}, **narrow)
    counts = Counter(h.tokens[0] for h in found)
    assert set(counts) <= set(expected)
    assert all(counts[w] or count * p < 12 for w, p in expected.items())
    chi_square_is_plausible(counts, {w: count * p for w, p in expected.items()})


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}], ids=str)
def test_samples_of_the_likeliest_word_are_greedy(narrow):
    features = random_photos(8)
    greedy = decode(LARGE, features, SPECIAL, DecodingOptions(beam_size=1, max_words=8))
    sampled = decode(LARGE, features, SPECIAL, DecodingOptions(method="sample", max_words=8, **narrow))
    assert [h[0].tokens for h in sampled] == [h[0].tokens for h in greedy]


def test_seed_chooses_the_samples():
    features = random_photos(1)
    options = DecodingOptions(method="sample", num_captions=4)
    assert decode(LARGE, features, SPECIAL, options) == decode(LARGE, features, SPECIAL, options)
    assert decode(LARGE, features, SPECIAL, options) != decode(LARGE, features, SPECIAL, replace(options, seed=1))
    assert len({h.tokens for h in decode(LARGE, features, SPECIAL, options)[0]}) > 1


def test_uniform_numbers_are_uniform():
    numbers = _uniform(np.arange(100_000, dtype=np.uint64))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = Counter((numbers * 64).astype(int).tolist())
    chi_square_is_plausible(counts, dict.fromkeys(range(64), 100_000 / 64))
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02

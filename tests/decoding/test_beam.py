"""Sampling, diverse groups, and the likeliest words."""

# ruff: noqa: F811

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import SIZE, SPECIAL, Outcome, Table, allowed, decoder, everything, logprobs, models, one_thread, photos  # noqa: F401 - fixtures

from captioner.config import DecodingOptions
from captioner.decoding.beam import _uniform, smallest
from captioner.decoding.search import decode

# Sampling


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


def kept_words(probabilities, *, temperature=1.0, top_k=0, top_p=1.0, typical_p=1.0):
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
    kept = reaching(kept, sorted(kept, key=kept.get, reverse=True), top_p)
    entropy = sum(-p * math.log(p) for p in kept.values())
    strangeness = {w: abs(-math.log(p) - entropy) for w, p in kept.items()}
    return reaching(kept, sorted(kept, key=strangeness.get), typical_p)


@pytest.mark.parametrize(
    "narrow",
    [
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"typical_p": 0.5},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "typical_p": 0.7},
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
def test_samples_of_the_likeliest_word_are_greedy(decoder, narrow):
    features = torch.rand(8, 4096)
    greedy = decode(decoder, features, SPECIAL, DecodingOptions(beam_size=1, max_words=8))
    sampled = decode(decoder, features, SPECIAL, DecodingOptions(method="sample", max_words=8, **narrow))
    assert [h[0].tokens for h in sampled] == [h[0].tokens for h in greedy]


def test_seed_chooses_the_samples(decoder):
    features = torch.rand(1, 4096)
    options = DecodingOptions(method="sample", num_captions=4)
    assert decode(decoder, features, SPECIAL, options) == decode(decoder, features, SPECIAL, options)
    assert decode(decoder, features, SPECIAL, options) != decode(decoder, features, SPECIAL, replace(options, seed=1))
    assert len({h.tokens for h in decode(decoder, features, SPECIAL, options)[0]}) > 1


def test_uniform_numbers_are_uniform():
    numbers = _uniform(torch.arange(100_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = Counter((numbers * 64).int().tolist())
    chi_square_is_plausible(counts, dict.fromkeys(range(64), 100_000 / 64))
    assert abs(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1]) < 0.02


# Diverse groups


def test_groups_differ_where_they_can():
    model, options = (
        Table(3, sharpness=0.5),
        DecodingOptions(beam_size=3, beam_groups=3, num_captions=3, diversity=50.0),
    )
    found = decode(model, photos(7), SPECIAL, options)[0]
    for n in range(min(len(h.tokens) for h in found)):
        assert len({h.tokens[n] for h in found}) == 3


@settings(max_examples=40, deadline=None)
@given(models, st.integers(0, 900), st.sampled_from([0.3, 1.0, 3.0]))
def test_groups_of_one_equal_a_plain_search(model, photo, diversity):
    beams = [((), 0.0)] * 3
    pool = [None] * 3
    for _ in range(5):
        chosen = Counter()
        for group in range(3):
            if pool[group]:
                continue
            tokens, logprob = beams[group]
            following = logprobs(model, photo, tokens)
            words, may_end = allowed(tokens, model.size, DecodingOptions())
            word = max(words, key=lambda w: following[w] - diversity * chosen[w])
            if may_end and following[SPECIAL.end] > following[word] - diversity * chosen[word]:
                pool[group] = Outcome(tokens, logprob + following[SPECIAL.end], True)
            # A group that ends here still takes the word from the others.
            chosen[word] += 1
            beams[group] = ((*tokens, word), logprob + following[word])
    options = DecodingOptions(beam_size=3, beam_groups=3, num_captions=3, max_words=5, diversity=diversity)
    outcomes = {done or Outcome(*beam, False) for done, beam in zip(pool, beams, strict=True)}
    distinct = {o.tokens: o for o in sorted(outcomes, key=lambda o: o.logprob)}
    expected = sorted(distinct.values(), key=lambda o: -o.logprob)
    found = decode(model, photos(photo), SPECIAL, options)[0]
    assert [h.tokens for h in found] == [o.tokens for o in expected]


def test_an_ending_competes_with_words_that_other_groups_made_dearer():
    class Alike(Table):
        """[end] is a little less likely than one word; the others are hardly possible."""

        def step(self, tokens, state):
            logits = torch.full((len(tokens), SIZE), -9.0)
            logits[:, SPECIAL.ids(SIZE)[1]], logits[:, SPECIAL.end] = 0.0, -0.3
            return logits, state

    options = DecodingOptions(beam_size=2, beam_groups=2, num_captions=2, min_words=0, max_words=1)
    found = decode(Alike(), photos(1), SPECIAL, options)[0]
    assert [h.tokens for h in found] == [(SPECIAL.ids(SIZE)[1],), ()]


class Tree(Table):
    """A model told by the probabilities of words after words; what is left is [pad]'s."""

    def __init__(self, following):
        self.size = SIZE
        self.following = following

    def start(self, features):
        self.paths = [()]
        return (torch.zeros(1, len(features), 1),)

    def step(self, tokens, state):
        pasts = [self.paths[int(number)] for number in state[0].flatten()]
        new = [past if t == SPECIAL.start else (*past, t) for past, t in zip(pasts, tokens.tolist(), strict=True)]
        probabilities = torch.full((len(tokens), SIZE), 1e-9)
        for row, path in zip(probabilities, new, strict=True):
            for word, probability in self.following.get(path, {}).items():
                row[word] = probability
            row[SPECIAL.pad] = 1 - sum(self.following.get(path, {}).values())
        numbers = torch.arange(len(self.paths), len(self.paths) + len(new))
        self.paths += new
        return probabilities.log(), (numbers[None, :, None],)


def test_a_group_that_cannot_win_still_takes_its_words_from_the_next():
    """Or the best caption would depend on how many are asked for."""
    end, (a, b, c, d, e, f, *_) = SPECIAL.end, SPECIAL.ids(SIZE)
    model = Tree(
        {
            (): {a: 0.5, b: 0.3, c: 0.1, d: 0.05},
            (a,): {end: 0.02, e: 0.0026, f: 0.0025},  # in the first group `a` ends early, and `a e` cannot win any more
            (b,): {e: 0.001, f: 0.001},
            (a, e): {a: 0.9},
            (a, f): {a: 0.8},
            (c,): {d: 0.99},
            (c, d): {a: 0.5, b: 0.29, f: 0.2},  # but it takes `a` from the second group
            (c, d, a): {end: 0.99},
            (c, d, b): {end: 0.99},
            (c, d, f): {end: 0.99},
        }
    )
    options = DecodingOptions(beam_size=4, beam_groups=2, num_captions=4, diversity=4.0, max_words=6)
    expected = decode(model, photos(1), SPECIAL, options)[0]
    for count in (1, 2, 3):
        found = decode(model, photos(1), SPECIAL, replace(options, num_captions=count))[0]
        assert found == expected[:count]


def test_groups_find_no_caption_twice():
    model = Table(3, sharpness=6.0)
    options = DecodingOptions(beam_size=6, beam_groups=3, num_captions=6, diversity=0.0)
    found = decode(model, photos(7), SPECIAL, options)[0]
    assert len({h.tokens for h in found}) == len(found)


@pytest.mark.parametrize("normalisation", ["none", "average"])
def test_captions_of_a_dead_group_come_after_those_of_a_live_one(normalisation):
    """However likely what it had written was."""
    end, (a, b) = SPECIAL.end, SPECIAL.ids(SIZE)[:2]

    class Trap(Table):
        """`a` is very likely, and nothing can follow it; `b` is not, and only [end] follows, also not likely."""

        def step(self, tokens, state):
            logits = torch.full((len(tokens), SIZE), -torch.inf)
            first = tokens == SPECIAL.start
            logits[first, a], logits[first, b] = 5.0, 0.0
            after = (tokens == b).nonzero()[:, 0]
            logits[after, SPECIAL.unk], logits[after, end] = 9.0, 0.0
            return logits, state

    options = DecodingOptions(
        beam_size=2, beam_groups=2, num_captions=2, diversity=50.0, length_normalisation=normalisation
    )
    live, dead = decode(Trap(), photos(1), SPECIAL, options)[0]
    assert (live.tokens, live.finished) == ((b,), True)
    assert (dead.tokens, dead.finished) == ((a,), False)
    assert live.score < dead.score


# The likeliest words


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([3, 500, 512, 2047, 2048, 2049, 2560, 3000, 9487]),
    st.integers(1, 80),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_smallest_is_topk(rows, size, count, dtype, seed):
    values = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype) * 9
    values[values > 8] = torch.inf
    count = min(count, size)
    value, index = smallest(values.clone(), count)
    expected = values.topk(count, dim=1, largest=False).values
    assert value.dtype == dtype
    assert value.shape == index.shape == (rows, count)
    assert torch.equal(value, expected)
    assert torch.equal(values.gather(1, index), expected)
    assert all(len(set(row)) == len(row) for row in index.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_is_larger_than_all(dtype):
    values = torch.full((1, 2100), torch.nan, dtype=dtype)
    values[0, [5, 2099]] = torch.tensor([torch.inf, 0.5], dtype=dtype)
    value, index = smallest(values, 3)
    assert value[0, :2].tolist() == [0.5, math.inf]
    assert index[0, :2].tolist() == [2099, 5]
    assert value[0, 2].isnan()


def test_smallest_counts_the_last_entry_once():
    values = torch.full((1, 2048), 3.0)
    values[0, [0, 2047]] = torch.tensor([1.0, 2.0])
    assert smallest(values, 3)[0].tolist() == [[1.0, 2.0, 3.0]]

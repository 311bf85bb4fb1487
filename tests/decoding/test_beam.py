"""Diverse groups of a beam."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import SIZE, SPECIAL, Logits, Outcome, Table, allowed, logprobs, models, photos

from captioner.config import DecodingOptions
from captioner.decoding.search import decode


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

        def read(self, tokens, state):
            logits = np.full((len(tokens), SIZE), -9.0)
            logits[:, SPECIAL.ids(SIZE)[1]], logits[:, SPECIAL.end] = 0.0, -0.3
            return logits, state

    options = DecodingOptions(beam_size=2, beam_groups=2, num_captions=2, min_words=0, max_words=1)
    found = decode(Alike(), photos(1), SPECIAL, options)[0]
    assert [h.tokens for h in found] == [(SPECIAL.ids(SIZE)[1],), ()]


class Tree(Logits):
    """A model told by the probabilities of words after words; what is left is [pad]'s."""

    vocabulary_size = SIZE

    def __init__(self, following):
        self.following = following

    def begin(self, features):
        self.paths = [()]
        return np.zeros(len(features), np.int64)

    def read(self, tokens, state):
        pasts = [self.paths[number] for number in state]
        new = [past if t == SPECIAL.start else (*past, t) for past, t in zip(pasts, tokens.tolist(), strict=True)]
        probabilities = np.full((len(tokens), SIZE), 1e-9)
        for row, path in zip(probabilities, new, strict=True):
            for word, probability in self.following.get(path, {}).items():
                row[word] = probability
            row[SPECIAL.pad] = 1 - sum(self.following.get(path, {}).values())
        numbers = np.arange(len(self.paths), len(self.paths) + len(new))
        self.paths += new
        return np.log(probabilities), numbers


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

        def read(self, tokens, state):
            logits = np.full((len(tokens), SIZE), -np.inf)
            first = tokens == SPECIAL.start
            logits[first, a], logits[first, b] = 5.0, 0.0
            after = np.flatnonzero(tokens == b)
            logits[after, SPECIAL.unk], logits[after, end] = 9.0, 0.0
            return logits, state

    options = DecodingOptions(
        beam_size=2, beam_groups=2, num_captions=2, diversity=50.0, length_normalisation=normalisation
    )
    live, dead = decode(Trap(), photos(1), SPECIAL, options)[0]
    assert (live.tokens, live.finished) == ((b,), True)
    assert (dead.tokens, dead.finished) == ((a,), False)
    assert live.score < dead.score

"""Small models, and searches for captions that are too slow to use and too plain to be wrong."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from captioner.decoding.step import Likeliest

WORDS = "abcdefgh"


class Special:
    """A vocabulary of letters, whose special ids are not the first ones."""

    pad, start, end, unk = 5, 1, 2, 0

    def ids(self, size):
        return [i for i in range(size) if i not in (self.pad, self.start, self.end, self.unk)]

    def encode(self, captions):
        known = dict(zip(WORDS, self.ids(12), strict=True))
        return [[self.start, *(known.get(word, self.unk) for word in text.split()), self.end] for text in captions]


SPECIAL = Special()
SIZE = 12


def log_softmax(logits):
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


class Logits:
    """A model told by its logits: a child defines `vocabulary_size`, `begin(features)` and `read(tokens, state)`."""

    rows = 0  # that it was asked about

    def start(self, features):
        return self.begin(features)

    def step_all(self, tokens, parents, state):
        self.rows += len(tokens)
        assert len(tokens) == len(parents)
        logits, state = self.read(tokens, state[parents])
        assert len(logits) == len(tokens)
        return log_softmax(logits.astype(np.float64)).astype(np.float32), state

    def step(self, tokens, parents, state, count, named):
        assert 1 <= count <= self.vocabulary_size
        logprob, state = self.step_all(tokens, parents, state)
        # As its definition says: sorted, of equals the lower id first; rows without numbers have any words.
        word = np.argsort(-logprob, axis=1, kind="stable")[:, :count]
        answer = Likeliest(np.take_along_axis(logprob, word, 1), word, logprob[:, named])
        for part in answer:
            part.flags.writeable = False
        return answer, state


@dataclass
class Table(Logits):
    """A model whose next word depends on every word before: a table of random logits, looked up by the whole past."""

    seed: int = 0
    size: int = SIZE
    sharpness: float = 1.0

    def __post_init__(self):
        self.logits = np.random.default_rng(self.seed).normal(size=(997, self.size)) * self.sharpness
        self.logits = self.logits.astype(np.float32)

    @property
    def vocabulary_size(self):
        return self.size

    def begin(self, features):
        return features[:, 0].astype(np.int64)

    def read(self, tokens, state):
        code = (state * 31 + tokens + 1) % 997
        return self.logits[code].copy(), code


def photos(*numbers):
    features = np.zeros((len(numbers), 4096), np.float32)
    features[:, 0] = numbers
    return features


def random_photos(count, seed=0):
    """Photos whose numbers a table can look up, and whose other numbers differ too."""
    generator = np.random.default_rng(seed)
    features = generator.random((count, 4096), dtype=np.float32)
    features[:, 0] = generator.integers(0, 900, count)
    return features


@dataclass(frozen=True)
class Outcome:
    tokens: tuple[int, ...]
    logprob: float
    finished: bool

    def score(self, options):
        length = len(self.tokens) + self.finished
        if options.length_normalisation == "average":
            return self.logprob / length
        if options.length_normalisation == "gnmt":
            return self.logprob / ((5 + length) / 6) ** options.gnmt_alpha
        return self.logprob


def logprobs(model, photo, tokens):
    """Log-probabilities of the word after `tokens`, one plain step after another."""
    state = model.start(photos(photo))
    for token in (SPECIAL.start, *tokens):
        found, state = model.step_all(np.array([token]), np.zeros(1, np.int64), state)
    return found[0].tolist()


def allowed(tokens, size, options):
    """The words that may follow, and whether the caption may end."""
    banned = {i for word in options.forbidden_words for i in SPECIAL.encode([word])[0]}
    words = [w for w in SPECIAL.ids(size) if w not in banned]
    n = options.no_repeat_ngram
    if n:
        seen = {tokens[i : i + n] for i in range(len(tokens) - n + 1)}
        words = [w for w in words if (*tokens, w)[-n:] not in seen]
    if options.unique_words:  # of the letters, "a" is a word of grammar
        words = [w for w in words if w not in tokens or w in SPECIAL.encode(["a"])[0]]
    return words, len(tokens) >= options.min_words


def everything(model, photo, options, tokens=(), logprob=0.0):
    """All captions that there are."""
    if len(tokens) == options.max_words:
        return [Outcome(tokens, logprob, False)]
    following = logprobs(model, photo, tokens)
    words, may_end = allowed(tokens, model.size, options)
    found = [Outcome(tokens, logprob + following[SPECIAL.end], True)] if may_end else []
    for word in words:
        found += everything(model, photo, options, (*tokens, word), logprob + following[word])
    return found


def has(tokens, phrase):
    wanted = tuple(SPECIAL.encode([phrase])[0][1:-1])
    return any(tokens[i : i + len(wanted)] == wanted for i in range(len(tokens)))


def likeliest(candidates, count, logprob):
    """The likeliest of some; where the last place is a draw, other arithmetic may give it to another."""
    ranked = sorted(candidates, key=lambda c: -logprob(c))
    assume(len(ranked) <= count or logprob(ranked[count - 1]) - logprob(ranked[count]) > 1e-3)
    return ranked[:count]


def plain_beam(model, photo, options):
    """Beam search for one photo, word by word, on lists."""
    beams, pool = [((), 0.0)], []
    for _ in range(options.max_words):
        going, ends = [], []
        for tokens, logprob in beams:
            following = logprobs(model, photo, tokens)
            words, may_end = allowed(tokens, model.size, options)
            going += [((*tokens, word), logprob + following[word]) for word in words]
            ends += [(tokens, logprob + following[SPECIAL.end])] if may_end else []
        going = likeliest(going, options.width, lambda c: c[1])
        both = [*((*c, False) for c in going), *((*c, True) for c in ends)]
        pool += [Outcome(*c) for c in likeliest(both, options.width, lambda c: c[1]) if c[2]]
        beams = going
        if len(pool) >= options.width:
            break
    else:
        pool += [Outcome(*c, False) for c in beams]
    return sorted(pool, key=lambda o: -o.score(options))


def same(found, expected, options):
    """Compare ranked lists; neighbours whose scores cannot be told apart may have changed places."""
    assert len(found) == min(len(expected), options.num_captions)
    for mine, theirs in zip(found, expected, strict=False):
        assert mine.score == pytest.approx(theirs.score(options), rel=1e-6, abs=1e-4)
        (again,) = [o for o in expected if o.tokens == mine.tokens and o.finished == mine.finished]
        assert mine.logprob == pytest.approx(again.logprob, rel=1e-6, abs=1e-4)
        assert mine.score == pytest.approx(again.score(options), rel=1e-6, abs=1e-4)


searches = st.fixed_dictionaries(
    {
        "max_words": st.integers(1, 4),
        "min_words": st.integers(0, 1),
        "length_normalisation": st.sampled_from(["none", "average", "gnmt"]),
        "no_repeat_ngram": st.integers(0, 2),
        "unique_words": st.booleans(),
        "forbidden_words": st.sampled_from([(), ("a",), ("a", "c", "zebra")]),
    }
)
models = st.builds(Table, st.integers(0, 10**6), st.sampled_from([7, 8]), st.sampled_from([0.1, 1.0, 4.0, 100.0]))


LARGE = Table(7, size=2500, sharpness=3.0)
LARGE.logits[:, SPECIAL.end] += 5.0

ways = {
    "greedy": {"beam_size": 1},
    "beam": {"beam_size": 5, "num_captions": 3},
    "average": {"length_normalisation": "average", "no_repeat_ngram": 2, "unique_words": True},
    "groups": {"beam_size": 6, "beam_groups": 3, "num_captions": 2},
    "required": {"required_words": ("a", "b c|d")},
    "sample": {"method": "sample", "num_captions": 3},
    "top k": {"method": "sample", "temperature": 0.8, "top_k": 50, "top_p": 0.9, "no_repeat_ngram": 1},
    "nucleus": {"method": "sample", "num_captions": 2, "top_p": 0.9, "no_repeat_ngram": 2},
}


def check_rules(hypothesis, options):
    tokens = hypothesis.tokens
    assert not {SPECIAL.pad, SPECIAL.start, SPECIAL.end, SPECIAL.unk}.intersection(tokens)
    assert len(tokens) <= options.max_words
    if hypothesis.finished:
        assert len(tokens) >= options.min_words
    n = options.no_repeat_ngram
    runs = [tokens[i : i + n] for i in range(len(tokens) - n + 1)] if n else []
    assert len(runs) == len(set(runs))
    assert not {i for word in options.forbidden_words for i in SPECIAL.encode([word])[0]}.intersection(tokens)

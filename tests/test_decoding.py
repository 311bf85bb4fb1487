"""The search is compared with searches that are too slow to use and too plain to be wrong."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from captioner import decoding
from captioner.config import DecoderConfig, DecodingOptions
from captioner.decoder import Decoder
from captioner.decoding import Hypothesis, decode
from captioner.errors import CaptionerError
from captioner.policies import _uniform, smallest
from captioner.prepared import PreparedDecoder, _sigmoid

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


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only get in each other's way with models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@dataclass
class Table:
    """A model whose next word depends on every word before: a table of random logits, looked up by the whole past."""

    seed: int = 0
    size: int = SIZE
    sharpness: float = 1.0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.logits = torch.randn(997, self.size, generator=generator) * self.sharpness
        self.rows = 0  # that it was asked about

    def start(self, features):
        return (features[None, :, :1].double(),)

    def step(self, tokens, state):
        self.rows += len(tokens)
        code = (state[0][0, :, 0] * 31 + tokens + 1) % 997
        return self.logits[code.long()], (code[None, :, None],)


def photos(*numbers):
    features = torch.zeros(len(numbers), 4096)
    features[:, 0] = torch.tensor(numbers, dtype=torch.float32)
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
        logits, state = model.step(torch.tensor([token]), state)
    return logits[0].double().log_softmax(0).tolist()


def allowed(tokens, size, options):
    """The words that may follow, and whether the caption may end."""
    banned = {i for word in options.forbidden_words for i in SPECIAL.encode([word])[0]}
    words = [w for w in SPECIAL.ids(size) if w not in banned]
    n = options.no_repeat_ngram
    if n:
        seen = {tokens[i : i + n] for i in range(len(tokens) - n + 1)}
        words = [w for w in words if (*tokens, w)[-n:] not in seen]
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
        "forbidden_words": st.sampled_from([(), ("a",), ("a", "c", "zebra")]),
    }
)
models = st.builds(Table, st.integers(0, 10**6), st.sampled_from([7, 8]), st.sampled_from([0.1, 1.0, 4.0, 100.0]))


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
    Table(17566, 7, 4.0),
    [387],
    {
        "max_words": 1,
        "min_words": 0,
        "length_normalisation": "average",
        "no_repeat_ngram": 0,
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


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden_size=64, embedding_size=32), 2500).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(100)
        decoder.output.bias.normal_()
        decoder.output.bias[SPECIAL.end] += 4
    return decoder


ways = {
    "greedy": {"beam_size": 1},
    "beam": {"beam_size": 5, "num_captions": 3},
    "average": {"length_normalisation": "average", "no_repeat_ngram": 2},
    "groups": {"beam_size": 6, "beam_groups": 3, "num_captions": 2},
    "required": {"required_words": ("a", "b c|d")},
    "sample": {"method": "sample", "num_captions": 3},
    "nucleus": {"method": "sample", "temperature": 0.8, "top_k": 50, "top_p": 0.9, "typical_p": 0.9},
}


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_equals_its_singles_bit_for_bit(decoder, way, precision, one_thread):
    torch.set_num_threads(one_thread if way == "greedy" else 1)
    options = DecodingOptions(max_words=12, **ways[way])
    model = PreparedDecoder(decoder, precision)
    features = torch.rand(12, 4096, generator=torch.Generator().manual_seed(1))
    together = decode(model, features, SPECIAL, options)
    assert together == [decode(model, photo[None], SPECIAL, options)[0] for photo in features]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert [together[i] for i in order] == decode(model, features[order], SPECIAL, options)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_numbers_that_fill_no_vector_change_no_bit(cell):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(cell=cell, hidden_size=300, embedding_size=32), 2500).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(100)
    model = PreparedDecoder(decoder, "fp32")
    options = DecodingOptions(max_words=8, num_captions=3)
    features = torch.rand(24, 4096, generator=torch.Generator().manual_seed(1))
    together = decode(model, features, SPECIAL, options)
    assert together == [decode(model, photo[None], SPECIAL, options)[0] for photo in features]


def test_threads_change_no_bit():
    """However they divide the work: 127 x 1204 numbers are whole vectors in no way."""
    x = 3 * torch.randn(127, 1204, generator=torch.Generator().manual_seed(0))
    expected = _sigmoid(x.clone())
    assert torch.allclose(expected, x.sigmoid())
    for threads in (2, 3, 5, 6):
        torch.set_num_threads(threads)
        assert torch.equal(_sigmoid(x.clone()), expected)


@pytest.mark.parametrize("way", ["sample", "beam"])
def test_log_probabilities_in_bf16_are_nearly_those_of_the_logits(decoder, way):
    """What a caption's words have by the same logits in double precision."""
    model = PreparedDecoder(decoder, "bf16")
    features = torch.rand(20, 4096, generator=torch.Generator().manual_seed(1))
    options = DecodingOptions(max_words=12, **ways[way])
    errors = []
    for photo, found in zip(features, decode(model, features, SPECIAL, options), strict=True):
        for hypothesis in found:
            state, exact, before = model.start(photo[None]), 0.0, SPECIAL.start
            for token in (*hypothesis.tokens, *([SPECIAL.end] * hypothesis.finished)):
                logits, state = model.step(torch.tensor([before]), state)
                exact += float(logits[0].double().log_softmax(0)[token])
                before = token
            errors.append(abs(hypothesis.logprob - exact))
    assert sum(errors) / len(errors) < 0.024  # rounded twice, they would be 0.032 off


@pytest.mark.parametrize("way", ways)
def test_batch_equals_its_singles_with_the_decoder_itself(decoder, way):
    options = DecodingOptions(max_words=12, **ways[way])
    features = torch.rand(8, 4096, generator=torch.Generator().manual_seed(1))
    for found, alone in zip(
        decode(decoder, features, SPECIAL, options),
        (decode(decoder, photo[None], SPECIAL, options)[0] for photo in features),
        strict=True,
    ):
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        assert [h.logprob for h in found] == pytest.approx([h.logprob for h in alone], abs=1e-3)


@pytest.mark.parametrize("way", ways)
def test_threads_take_turns_and_change_nothing(decoder, way, monkeypatch):
    monkeypatch.setattr(decoding, "_ROWS_CPU", 16)
    options = DecodingOptions(max_words=12, **ways[way])
    features = torch.rand(11, 4096, generator=torch.Generator().manual_seed(1))
    model = PreparedDecoder(decoder, "fp32")
    expected = decode(model, features, SPECIAL, options)
    torch.set_num_threads(3)
    assert decode(model, features, SPECIAL, options) == expected
    assert torch.get_num_threads() == 3


def test_words_are_refused_where_there_is_no_photo():
    for name in ("required_words", "forbidden_words"):
        with pytest.raises(CaptionerError, match=name):
            decode(Table(), photos(), SPECIAL, DecodingOptions(**{name: ("",)}))


def test_what_goes_wrong_in_a_thread_is_told(monkeypatch):
    class Wrong(Table):
        def step(self, tokens, state):
            raise RuntimeError("no logits today")

    monkeypatch.setattr(decoding, "_ROWS_CPU", 5)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="no logits today"):
        decode(Wrong(), photos(*range(9)), SPECIAL, DecodingOptions())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("way", ways)
def test_searches_that_are_over_may_stay_a_while(decoder, way, monkeypatch):
    """As on a GPU, where it is learned late that a search is over."""

    class Late(decoding._Roster):
        def survivors(self, logprob):
            alive = (logprob > -torch.inf).any(dim=1)
            late = self.late = [*getattr(self, "late", []), alive]
            known = late[-3] if len(late) > 2 else torch.ones_like(alive)
            return (known.nonzero() * logprob.shape[1] + torch.arange(logprob.shape[1])).flatten()

    options = DecodingOptions(max_words=12, **ways[way])
    features = torch.rand(10, 4096, generator=torch.Generator().manual_seed(1))
    model = PreparedDecoder(decoder, "fp32")
    expected = decode(model, features, SPECIAL, options)
    monkeypatch.setattr(decoding, "_Roster", Late)
    assert decode(model, features, SPECIAL, options) == expected


def test_beams_that_are_over_cost_nothing():
    model = Table(sharpness=0.0)
    model.logits[:, SPECIAL.end] = 30.0  # ends as soon as it may
    options = DecodingOptions(beam_size=4, min_words=2, max_words=20)
    decode(model, photos(1, 2, 3), SPECIAL, options)
    assert model.rows == 3 * (1 + 4 + 4)


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


# Constraints


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
    model.logits[:, SPECIAL.encode(["a"])[0][1]] = -torch.inf
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


# Ensembles


def test_ensemble_averages_probabilities():
    one, two = Table(1, size=7), Table(2, size=7)
    options = DecodingOptions(beam_size=2, max_words=1, min_words=0, num_captions=9)
    found = decode([one, two], photos(4), SPECIAL, options)[0]
    mean = [(math.exp(a) + math.exp(b)) / 2 for a, b in zip(logprobs(one, 4, ()), logprobs(two, 4, ()), strict=True)]
    for hypothesis in found:
        word = hypothesis.tokens[0] if hypothesis.tokens else SPECIAL.end
        assert hypothesis.logprob == pytest.approx(math.log(mean[word]), abs=1e-5)


def test_ensemble_of_one_model_twice_is_the_model(decoder):
    features, options = torch.rand(4, 4096), DecodingOptions(max_words=8)
    twice, once = (decode(m, features, SPECIAL, options) for m in ([decoder, decoder], decoder))
    assert [h[0].tokens for h in twice] == [h[0].tokens for h in once]


def test_ensemble_needs_one_vocabulary():
    with pytest.raises(ValueError, match="know 7 and 8 words"):
        decode([Table(size=7), Table(size=8)], photos(1), SPECIAL, DecodingOptions())
    with pytest.raises(ValueError, match="there is no model"):
        decode([], photos(1), SPECIAL, DecodingOptions())


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
        def start(self, features):
            return (*super().start(features), torch.zeros(1, len(features), 1))

        def step(self, tokens, state):
            logits, (code,) = super().step(tokens, state[:1])
            logits[:, SPECIAL.end] = -torch.inf
            return torch.where(state[1][0] >= from_word, value, logits), (code, state[1] + 1)

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
    model.logits[:, SPECIAL.end] = -torch.inf
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
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_favourite_may_be_forbidden_however_likely_it_is(way, precision):
    """The others have probabilities that no floating point number can tell from 0."""

    class Certain(Table):
        def step(self, tokens, state):
            logits, state = super().step(tokens, state)
            logits[:, SPECIAL.encode(["h"])[0][1]] += 500
            return logits.to(precision), state

    options = DecodingOptions(forbidden_words=("h",), max_words=6, min_words=6, **way)
    for found in decode(Certain(), photos(1, 2), SPECIAL, options):
        for hypothesis in found:
            check_rules(hypothesis, options)
            assert len(hypothesis.tokens) == 6
            assert hypothesis.satisfied
            assert hypothesis.logprob == pytest.approx(6 * -500, rel=0.02)


def test_no_photos():
    assert decode(Table(), torch.zeros(0, 4096), SPECIAL, DecodingOptions()) == []


def test_training_mode_is_refused(decoder):
    training = Decoder(DecoderConfig(hidden_size=8, embedding_size=8), 10)
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        decode(training, torch.rand(1, 4096), SPECIAL, DecodingOptions())


def test_fewer_captions_where_there_are_no_more():
    found = decode(Table(size=7), photos(1), SPECIAL, DecodingOptions(num_captions=50, max_words=1))[0]
    assert sorted(h.tokens for h in found) == [(3,), (4,), (6,)]
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert all(isinstance(h, Hypothesis) for h in found)


# Parts


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
        ({"typical_p": 1.5}, "typical_p is 1.5; expected a probability"),
        ({"diversity": -1.0}, "diversity is -1.0"),
        ({"beam_size": 5, "beam_groups": 2}, "does not divide the beam of 5"),
        ({"method": "magic"}, "method is 'magic'; expected one of beam, sample"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"method": "sample", "required_words": ("a",)}, 'need method "beam"'),
        ({"method": "sample", "beam_groups": 3}, 'beam_groups need method "beam"'),
    ],
)
def test_options_that_cannot_be_meant(given_options, match):
    with pytest.raises(CaptionerError, match=match):
        DecodingOptions(**given_options)

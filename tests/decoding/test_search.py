"""The search is compared with searches that are too slow to use and too plain to be wrong."""

# ruff: noqa: F811

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from searches import (  # noqa: F401 - fixtures
    SPECIAL,
    Table,
    check_rules,
    decoder,
    everything,
    logprobs,
    models,
    one_thread,
    photos,
    plain_beam,
    same,
    searches,
    ways,
)

from captioner.config import DecoderConfig, DecodingOptions
from captioner.decoding import search
from captioner.decoding.search import Hypothesis, decode
from captioner.errors import CaptionerError
from captioner.networks.decoder import Decoder
from captioner.networks.inference import PreparedDecoder, _sigmoid


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
    monkeypatch.setattr(search, "_ROWS_CPU", 16)
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

    monkeypatch.setattr(search, "_ROWS_CPU", 5)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="no logits today"):
        decode(Wrong(), photos(*range(9)), SPECIAL, DecodingOptions())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("way", ways)
def test_searches_that_are_over_may_stay_a_while(decoder, way, monkeypatch):
    """As on a GPU, where it is learned late that a search is over."""

    class Late(search._Roster):
        def survivors(self, logprob):
            alive = (logprob > -torch.inf).any(dim=1)
            late = self.late = [*getattr(self, "late", []), alive]
            known = late[-3] if len(late) > 2 else torch.ones_like(alive)
            return (known.nonzero() * logprob.shape[1] + torch.arange(logprob.shape[1])).flatten()

    options = DecodingOptions(max_words=12, **ways[way])
    features = torch.rand(10, 4096, generator=torch.Generator().manual_seed(1))
    model = PreparedDecoder(decoder, "fp32")
    expected = decode(model, features, SPECIAL, options)
    monkeypatch.setattr(search, "_Roster", Late)
    assert decode(model, features, SPECIAL, options) == expected


def test_beams_that_are_over_cost_nothing():
    model = Table(sharpness=0.0)
    model.logits[:, SPECIAL.end] = 30.0  # ends as soon as it may
    options = DecodingOptions(beam_size=4, min_words=2, max_words=20)
    decode(model, photos(1, 2, 3), SPECIAL, options)
    assert model.rows == 3 * (1 + 4 + 4)


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

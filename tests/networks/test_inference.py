"""An engine computes what the networks compute, and leaves them as they are."""

from typing import Any

import numpy as np
import pytest
import torch
from searches import SPECIAL, check_rules, ways
from torch.utils._python_dispatch import TorchDispatchMode

from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig, EncoderName
from captioner.decoding.explain import explain
from captioner.decoding.search import decode
from captioner.decoding.step import Ensemble
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchDecoder, TorchEngine, dtype_for, has_fast_bf16

CELLS = ["lstm", "gru", "rnn", "irnn"]
SIZE = 96  # of photos
NOTHING = np.zeros(0, np.int64)


def small(cell="lstm", layers=1, feature_norm="sqrt", dropout=0.5):
    torch.manual_seed(3)
    decoder = Decoder(
        DecoderConfig(
            cell=cell, layers=layers, hidden_size=24, embedding_size=16, feature_norm=feature_norm, dropout=dropout
        ),
        90,
    ).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


@pytest.fixture(scope="module")
def decoder():
    """It is sure of its words, so that no two captions are a tie."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(hidden_size=64, embedding_size=32), 2500).eval()
    with torch.no_grad():
        decoder.output.weight.mul_(100)
        decoder.output.bias.normal_()
        decoder.output.bias[SPECIAL.end] += 4
    return decoder


def vectors(count, seed=0):
    return np.random.default_rng(seed).random((count, 4096), dtype=np.float32)


def walk(model, features, steps=5, words=90):
    """Log-probabilities of all words, step after step, where every row goes on as itself."""
    state, rows = model.start(features), np.arange(len(features))
    for tokens in np.random.default_rng(0).integers(0, words, (steps, len(features))):
        logprob, state = model.step_all(tokens, rows, state)
        yield logprob


@torch.no_grad()
def plain_walk(decoder, features, steps=5, words=90):
    """The same with the decoder itself."""
    state = decoder.start(torch.from_numpy(features))
    for tokens in np.random.default_rng(0).integers(0, words, (steps, len(features))):
        logits, state = decoder.step(torch.from_numpy(tokens), state)
        yield logits.log_softmax(dim=1).numpy()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_engine_gives_the_probabilities_of_the_decoder(cell, layers):
    decoder, features = small(cell, layers), vectors(6)
    for exact, rounded, expected in zip(
        walk(TorchDecoder(decoder, "fp32"), features),
        walk(TorchDecoder(decoder, "bf16"), features),
        plain_walk(decoder, features),
        strict=True,
    ):
        assert exact.dtype == rounded.dtype == np.float32
        np.testing.assert_allclose(exact, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rounded, expected, rtol=0, atol=0.05 * np.abs(expected).max())
        assert np.abs(rounded - expected).max() > 1e-5


@pytest.mark.parametrize("norm", ["none", "sqrt", "standard"])
def test_features_are_normalised_as_in_training(norm):
    decoder, features = small(feature_norm=norm), vectors(3)
    if norm == "standard":
        decoder.standard.mean.normal_()
        decoder.standard.variance.uniform_(0.5, 2.0)
    (found,), (expected,) = (
        list(way) for way in (walk(TorchDecoder(decoder), features, 1), plain_walk(decoder, features, 1))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)
    found = next(walk(TorchDecoder(decoder, "fp32"), features))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_likeliest_words_are_those_of_all(precision):
    model, features = TorchDecoder(small(), precision), vectors(4)
    rows, tokens, named = np.array([3, 1, 1, 3, 0, 3]), np.array([7, 8, 9, 7, 6, 5]), np.array([2, 50, 3])
    _, state = model.step_all(np.array([5, 6, 7, 8]), np.arange(4), model.start(features))
    every, _ = model.step_all(tokens, rows, state)
    found, _ = model.step(tokens, rows, state, 5, named)
    assert [part.dtype for part in found] == [np.float32, np.int64, np.float32]
    assert np.array_equal(found.logprob, -np.sort(-every, axis=1)[:, :5])
    assert np.array_equal(np.take_along_axis(every, found.word, axis=1), found.logprob)
    assert np.array_equal(found.named, every[:, named])
    whole, _ = model.step(tokens, rows, state, 90, NOTHING)
    assert whole.named.shape == (6, 0)
    assert np.array_equal(np.sort(whole.word, axis=1), np.tile(np.arange(90), (6, 1)))


@pytest.mark.parametrize("cell", CELLS)
def test_rows_of_a_state_may_be_repeated_and_left_out(cell):
    model, features = TorchDecoder(small(cell, 2), "fp32"), vectors(4)
    tokens, rows = np.array([7, 8, 9, 7, 6, 5]), np.array([3, 1, 1, 3, 0, 3])
    _, state = model.step_all(np.array([5, 6, 7, 8]), np.arange(4), model.start(features))
    together, _ = model.step_all(tokens, rows, state)
    for row, (token, parent) in enumerate(zip(tokens, rows, strict=True)):
        alone, _ = model.step_all(np.array([token]), np.array([parent]), state)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_a_state_is_not_overwritten():
    """Many beams may continue one state."""
    model = TorchDecoder(small("lstm", 2), "bf16")
    state = model.start(vectors(3))
    kept = [part.clone() for part in state]
    first, _ = model.step_all(np.array([7, 8, 9]), np.arange(3), state)
    again, _ = model.step_all(np.array([7, 8, 9]), np.arange(3), state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert np.array_equal(first, again)


def test_the_cell_state_is_not_rounded():
    """It carries all that was written so far."""
    model = TorchDecoder(small("lstm", 2), "bf16")
    state = model.start(vectors(3))
    assert {part.dtype for part in state} == {torch.float32}
    _, (_, c) = model.step_all(np.array([7, 8, 9]), np.arange(3), state)
    assert c.dtype == torch.float32
    assert not torch.equal(c, c.bfloat16().float())


def test_training_mode_makes_no_difference_and_stays():
    decoder, features = small("lstm", 2, "standard"), vectors(4)
    expected = decode(TorchDecoder(decoder, "fp32"), features, SPECIAL, DecodingOptions())
    decoder.train()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    assert decode(TorchDecoder(decoder, "fp32"), features, SPECIAL, DecodingOptions()) == expected
    assert all(module.training for module in decoder.modules())
    assert decoder.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_a_decoder_goes_on_learning():
    decoder, features = small(), vectors(2)
    decode(TorchDecoder(decoder), features, SPECIAL, DecodingOptions(max_words=3))
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    decoder(torch.from_numpy(features), torch.ones(2, 3, dtype=torch.long)).sum().backward()
    assert decoder.output.bias.grad is not None


def test_weights_are_shared_unless_they_are_converted():
    decoder = small()
    shared = TorchDecoder(decoder, "fp32")._decoder
    assert shared.output.weight.data_ptr() == decoder.output.weight.data_ptr()
    assert TorchDecoder(decoder, "bf16")._decoder.output.weight.dtype == torch.bfloat16
    assert decoder.output.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_words_that_are_about_as_likely_stay_apart(precision, decoder):
    logprob = next(walk(TorchDecoder(decoder, precision), vectors(4), words=2500))
    assert all(len(np.unique(row)) > 0.99 * len(row) for row in logprob)


def test_a_vocabulary_may_be_tiny():
    decoder = Decoder(DecoderConfig(hidden_size=4, embedding_size=4), 5)
    assert next(walk(TorchDecoder(decoder, "bf16"), vectors(2), words=5)).shape == (2, 5)


def test_a_row_without_numbers_has_none():
    decoder = small()
    features = vectors(3)
    features[1] = np.nan
    model = TorchDecoder(decoder, "fp32")
    found, _ = model.step(np.array([1, 1, 1]), np.arange(3), model.start(features), 4, np.array([2]))
    assert np.isnan(found.logprob[1]).all()
    assert np.isnan(found.named[1]).all()
    assert np.isfinite(found.logprob[[0, 2]]).all()
    captions = decode(model, features, SPECIAL, DecodingOptions())
    assert (captions[1][0].tokens, captions[1][0].finished) == ((), False)
    assert captions[::2] == decode(model, features[::2], SPECIAL, DecodingOptions())


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_caption_does_not_depend_on_the_batch(decoder, way, precision):
    options = DecodingOptions(max_words=12, **ways[way])
    model, features = TorchDecoder(decoder, precision), vectors(8, 1)
    together = decode(model, features, SPECIAL, options)
    for found, photo in zip(together, features, strict=True):
        alone = decode(model, photo[None], SPECIAL, options)[0]
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        assert [h.logprob for h in found] == pytest.approx([h.logprob for h in alone], abs=1e-3)
        for hypothesis in found:
            check_rules(hypothesis, options)
    assert together == decode(model, features, SPECIAL, options, workers=2)


def test_log_probabilities_are_those_of_the_decoder(decoder):
    features, options = vectors(5), DecodingOptions(max_words=12)
    for photo, (found,) in zip(
        features, decode(TorchDecoder(decoder, "fp32"), features, SPECIAL, options), strict=True
    ):
        tokens = [SPECIAL.start, *found.tokens, *([SPECIAL.end] * found.finished)]
        with torch.no_grad():
            logits = decoder(torch.from_numpy(photo[None]), torch.tensor([tokens[:-1]]))[0]
        each = logits.double().log_softmax(dim=1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
        assert found.logprob == pytest.approx(float(each.sum()), abs=1e-3)


def test_ensembles_and_trees(decoder):
    model, features = TorchDecoder(decoder, "fp32"), vectors(1)
    options = DecodingOptions(max_words=8)
    once, twice = (decode(m, features, SPECIAL, options)[0][0] for m in (model, Ensemble([model, model])))
    assert once.tokens == twice.tokens
    assert explain(model, features, SPECIAL, options).captions[0].tokens == once.tokens


class NothingToWaitFor(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select", "unique", "_unique2", "equal"), name
        if name == "index":
            assert not any(index is not None and index.dtype == torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_within_a_step_makes_the_host_wait(precision):
    engine = TorchEngine(Encoder(EncoderConfig("tiny", "random", 32)), small("lstm", 2), precision)
    with NothingToWaitFor():
        state = engine.start(engine.features(np.zeros((2, 3, 32, 32), np.uint8)))
        engine.step(np.array([1, 1]), np.arange(2), state, 3, np.array([2]))
        engine.step_all(np.array([1, 1]), np.arange(2), state)


# Photos


def encoder(name: EncoderName, **options: Any) -> Encoder:
    """With statistics that normalisation has something to do with."""
    made = Encoder(EncoderConfig(name, "random", SIZE), **options)
    torch.manual_seed(0)
    for buffer_name, buffer in made.body.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif buffer_name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return made


def photos(count=3, size=(SIZE, SIZE)):
    return np.random.default_rng(1).integers(0, 256, (count, 3, *size), dtype=np.uint8)


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["tiny", "mini", "vgg16_bn", "alexnet", "resnet50", "squeezenet1_1", "googlenet"])
def test_an_engine_sees_what_the_encoder_sees(name: EncoderName):
    plain = encoder(name)
    expected = plain(torch.from_numpy(photos())).numpy()
    exact, rounded = (TorchEngine(plain, small(), precision) for precision in ("fp32", "bf16"))
    assert exact.image_size == SIZE
    assert exact.features(photos()).dtype == rounded.features(photos()).dtype == np.float32
    assert distance(exact.features(photos()), expected) < 1e-5
    assert 1e-5 < distance(rounded.features(photos()), expected) < 0.02
    assert np.array_equal(plain(torch.from_numpy(photos())).numpy(), expected)  # the encoder is as it was


def test_photos_of_another_size():
    plain, larger = encoder("mini"), photos(2, (130, 110))
    found = TorchEngine(plain, small(), "fp32").features(larger)
    assert distance(found, plain(torch.from_numpy(larger)).numpy()) < 1e-5


@pytest.mark.parametrize("name", ["mini", "alexnet"])
def test_an_encoder_that_learns_is_seen_with_its_statistics_and_goes_on(name: EncoderName):
    """Without dropout (of AlexNet), and without those of the batch (of mini)."""
    plain = encoder(name, trainable=True)
    with torch.no_grad():
        expected = plain(torch.from_numpy(photos())).numpy()
    plain.train()
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    found = TorchEngine(plain, small(), "fp32").features(photos())
    assert distance(found, expected) < 1e-5
    assert plain.body.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in plain.state_dict().items())
    plain(torch.from_numpy(photos())).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_features_are_arrays_that_anything_may_use():
    found = TorchEngine(encoder("tiny"), small()).features(photos())
    weight = torch.ones(4096, requires_grad=True)
    (torch.from_numpy(found) @ weight).sum().backward()
    assert weight.grad is not None
    assert found.flags.writeable


# Precision


def test_precision():
    device = torch.device("cpu")
    assert dtype_for("fp32", device) == torch.float32
    assert dtype_for("bf16", device) == torch.bfloat16
    assert dtype_for("auto", device) == (torch.bfloat16 if has_fast_bf16(device) else torch.float32)
    assert not has_fast_bf16(torch.device("meta"))
    assert dtype_for("auto", torch.device("meta")) == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_without_bf16_computes_in_fp16(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dtype_for("auto", torch.device("cuda")) == dtype
    assert dtype_for("fp32", torch.device("cuda")) == torch.float32

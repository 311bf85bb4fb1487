"""The prepared decoder computes what the decoder computes."""

import pytest
import torch
from searches import SPECIAL, one_thread  # noqa: F401 - a fixture that applies by itself

from captioner.config import DecoderConfig, DecodingOptions
from captioner.decoding.search import decode
from captioner.networks import inference
from captioner.networks.decoder import Decoder
from captioner.networks.inference import PreparedDecoder, dtype_for, has_fast_bf16

CELLS = ["lstm", "gru", "rnn", "irnn"]


def small(cell, layers, feature_norm="sqrt"):
    torch.manual_seed(3)
    config = DecoderConfig(cell=cell, layers=layers, hidden_size=24, embedding_size=16, feature_norm=feature_norm)
    decoder = Decoder(config, 90).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def walk(model, features, steps=5, words=90):
    state = model.start(features)
    tokens = torch.randint(0, words, (steps, len(features)), generator=torch.Generator().manual_seed(0))
    for each in tokens:
        logits, state = model.step(each, state)
        yield logits


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.inference_mode()
def test_prepared_equals_the_decoder(cell, layers):
    decoder = small(cell, layers)
    features = torch.rand(6, 4096)
    for exact, rounded, expected in zip(
        walk(PreparedDecoder(decoder, "fp32"), features),
        walk(PreparedDecoder(decoder, "bf16"), features),
        walk(decoder, features),
        strict=True,
    ):
        assert exact.dtype == torch.float32
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-4)
        off = rounded.float() - expected  # by about the same number in all places, which changes no probability
        off -= off.median()
        torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=0.05 * expected.abs().max().item())


@torch.inference_mode()
def test_features_are_normalised_as_in_training():
    features = torch.rand(3, 4096)
    for norm in ("none", "sqrt", "standard"):
        decoder = small("lstm", 1, norm)
        prepared = PreparedDecoder(decoder, "fp32").start(features)
        for mine, theirs in zip(prepared[:-1], decoder.start(features), strict=True):  # the last are numbers of rows
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_without_onednn_it_computes_the_same(monkeypatch):
    decoder, features = small("lstm", 2), torch.rand(4, 4096)
    expected = list(walk(PreparedDecoder(decoder, "fp32"), features))
    monkeypatch.setattr(inference, "_onednn_linear", lambda weight, bias: None)
    for mine, theirs in zip(walk(PreparedDecoder(decoder, "fp32"), features), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_training_mode_makes_no_difference():
    decoder, features = small("lstm", 1, "standard"), torch.rand(4, 4096)
    expected = decode(PreparedDecoder(decoder, "fp32"), features, SPECIAL, DecodingOptions())
    assert decode(PreparedDecoder(decoder.train(), "fp32"), features, SPECIAL, DecodingOptions()) == expected
    assert decoder.training


def test_state_is_not_overwritten():
    """Many beams may continue one state."""
    model, features = PreparedDecoder(small("lstm", 2), "bf16"), torch.rand(3, 4096)
    with torch.inference_mode():
        state = model.start(features)
        kept = [part.clone() for part in state]
        table = model.table.clone()
        model.step(torch.tensor([7, 8, 9]), state)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert torch.equal(model.table, table)


@torch.inference_mode()
def test_rows_of_a_state_may_be_repeated_and_left_out():
    for cell in CELLS:
        decoder, features = small(cell, 2), torch.rand(4, 4096)
        rows, tokens = torch.tensor([3, 1, 1, 3, 0, 3]), torch.tensor([7, 8, 9, 7, 6, 5])
        answers = []
        for model in (PreparedDecoder(decoder, "fp32"), decoder):
            _, state = model.step(torch.tensor([5, 6, 7, 8]), model.start(features))
            answers.append(model.step(tokens, tuple(part.index_select(1, rows) for part in state))[0])
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_bfloat16_is_finest_for_likely_words():
    """Also where all logits are large, which changes no probability."""
    decoder = small("lstm", 1)
    features = torch.rand(6, 4096)
    expected = [logits.log_softmax(dim=1) for logits in walk(decoder, features)]
    decoder.output.bias.add_(100.0)
    for logits, right in zip(walk(PreparedDecoder(decoder, "bf16"), features), expected, strict=True):
        torch.testing.assert_close(logits.float().log_softmax(dim=1), right, rtol=0, atol=0.05)


def test_a_vocabulary_may_be_tiny():
    decoder = Decoder(DecoderConfig(hidden_size=4, embedding_size=4), 5).eval()
    logits = next(walk(PreparedDecoder(decoder, "bf16"), torch.rand(2, 4096), words=5))
    assert logits.shape == (2, 5)


@torch.inference_mode()
def test_logits_without_a_level_stay_as_they_are():
    decoder = small("lstm", 1)
    decoder.output.bias[0] = torch.nan
    logits = next(walk(PreparedDecoder(decoder, "bf16"), torch.rand(2, 4096)))
    assert logits[:, 1:].isfinite().all()


def test_precision():
    device = torch.device("cpu")
    assert dtype_for("fp32", device) == torch.float32
    assert dtype_for("bf16", device) == torch.bfloat16
    assert dtype_for("auto", device) == (torch.bfloat16 if has_fast_bf16(device) else torch.float32)
    assert not has_fast_bf16(torch.device("meta"))

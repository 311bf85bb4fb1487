"""The decoder computes what its step says, learns what it is shown, and sees the photo once."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from captioner.config import CellName, DecoderConfig, FeatureNorm
from captioner.networks.decoder import Decoder, Dropout

CELLS = get_args(CellName)
SMALL = DecoderConfig(hidden_size=6, embedding_size=5, dropout=0.0, feature_norm="sqrt")
V = 11


def decoder(config=SMALL, vocabulary=V, **changes):
    torch.manual_seed(0)
    return Decoder(replace(config, **changes), vocabulary)


def shaken(model):
    """The same model in double precision, with no parameter near a special value such as 0 or the identity."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def features(count, seed=1):
    """Like those of an encoder: not negative, most of them 0."""
    return torch.randn(count, 4096, generator=torch.Generator().manual_seed(seed)).relu() * 3


def captions(count, length, seed=2):
    return torch.randint(0, V, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", get_args(FeatureNorm))
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_the_whole_sequence(cell, layers, norm):
    model = shaken(decoder(cell=cell, layers=layers, feature_norm=norm, dropout=0.4))
    photos, tokens = features(4).double(), captions(4, 9)
    whole = model(photos, tokens)
    assert whole.shape == (4, 9, V)
    state = model.start(photos)
    assert len(state) == (2 if cell == "lstm" else 1)
    for t in range(9):
        logits, state = model.step(tokens[:, t], state)
        assert all(part.shape == (layers, 4, 6) for part in state)
        assert torch.allclose(logits, whole[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_a_caption_does_not_depend_on_what_follows_or_stands_beside_it(cell):
    model = shaken(decoder(cell=cell, layers=2, feature_norm="standard"))
    photos, tokens = features(3).double(), captions(3, 7)
    whole = model(photos, tokens)
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % V
    assert torch.equal(model(photos, changed)[:, :4], whole[:, :4])
    assert not torch.allclose(model(photos, changed)[:, 4:], whole[:, 4:])
    for row in range(3):
        assert torch.allclose(model(photos[row : row + 1], tokens[row : row + 1])[0], whole[row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_through_time(cell, layers):
    """Numerical gradients of the loss of two captions, of every parameter and of the photo."""
    model = shaken(decoder(cell=cell, layers=layers, hidden_size=3, embedding_size=2))
    tokens, targets = captions(2, 5), captions(2, 5, seed=3)
    small = [(name, p) for name, p in model.named_parameters() if not name.startswith("initial.weight")]
    # Most of a photo is zero, where the square root has no slope; the gradient of what is not zero is checked.
    photos = torch.zeros(2, 4096, dtype=torch.double)
    shown = (torch.rand(2, 6, dtype=torch.double) + 0.5).requires_grad_()

    def loss(shown, *values):
        pixels = photos.index_copy(1, torch.arange(6) * 600, shown)
        state = dict(zip((name for name, _ in small), values, strict=True))
        logits = torch.func.functional_call(model, state, (pixels, tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    values = [p.detach().clone().requires_grad_() for _, p in small]
    assert torch.autograd.gradcheck(loss, (shown, *values), eps=1e-6, atol=1e-7, rtol=1e-5)
    # The matrix behind the photo has too many numbers for that: along a random direction instead.
    weight = model.initial.weight
    direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(loss(shown, *values), weight)
    with torch.no_grad():
        weight += 1e-6 * direction
        above = loss(shown, *values)
        weight -= 2e-6 * direction
        below = loss(shown, *values)
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", get_args(FeatureNorm))
def test_the_first_loss_is_ln_v(cell, norm):
    words = 5000
    model = decoder(DecoderConfig(cell=cell, feature_norm=norm, hidden_size=256), words)
    photos = features(16) if norm != "none" else F.normalize(features(16)) * 64
    tokens = torch.randint(0, words, (16, 12), generator=torch.Generator().manual_seed(2))
    for mode in (True, False):
        logits = model.train(mode)(photos, tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(words), rel=0.01)


@pytest.mark.parametrize("norm", get_args(FeatureNorm))
@pytest.mark.parametrize("cell", CELLS)
def test_over_fits_eight_captions(cell, norm):
    """Eight photos that the same words begin to describe: only the photo tells which caption follows."""
    torch.manual_seed(3)
    model = Decoder(replace(SMALL, cell=cell, hidden_size=48, embedding_size=16, feature_norm=norm), V)
    photos = features(8) if norm != "none" else F.normalize(features(8)) * 8
    tokens = torch.cat([torch.ones(8, 1, dtype=torch.long), captions(8, 7)], dim=1)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, total_iters=300)
    for _ in range(300):
        loss = F.cross_entropy(model(photos, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        schedule.step()
    assert loss < 0.05
    # Greedy search from the photo alone says them all.
    model.train(norm == "standard")  # whose running statistics are those of far more steps than these
    state, words = model.start(photos), [tokens[:, 0]]
    for _ in range(7):
        logits, state = model.step(words[-1], state)
        words.append(logits.argmax(1))
    assert torch.equal(torch.stack(words, dim=1), tokens)


@pytest.mark.parametrize("cell", CELLS)
def test_the_photo_enters_through_the_first_state_alone(cell):
    model = shaken(decoder(cell=cell, layers=2))
    tokens = captions(2, 4)
    seen, other = model.start(features(2).double()), model.start(features(2, seed=9).double())
    assert not any(torch.allclose(a, b) for a, b in zip(seen, other, strict=True))
    model.start = lambda photos: seen  # whatever the photo
    assert torch.equal(model(features(2).double(), tokens), model(features(2, seed=9).double(), tokens))


def test_the_first_state_is_in_the_range_of_the_cell():
    for cell in CELLS:
        model = shaken(decoder(cell=cell, layers=2))
        h0 = model.start(features(8).double() * 100)[0]
        assert h0.min() >= (0 if cell == "irnn" else -1)
        if cell != "irnn":
            assert h0.max() <= 1


def test_forget_gates_start_open():
    model = decoder(cell="lstm", layers=2, hidden_size=6)
    for layer in range(2):
        bias = getattr(model.rnn, f"bias_ih_l{layer}") + getattr(model.rnn, f"bias_hh_l{layer}")
        assert bias.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12  # input, forget, cell, output


def test_irnn_starts_as_the_identity():
    model = decoder(cell="irnn", layers=2, hidden_size=6)
    for layer in range(2):
        assert torch.equal(getattr(model.rnn, f"weight_hh_l{layer}"), torch.eye(6))
        assert not getattr(model.rnn, f"bias_ih_l{layer}").any()
        assert not getattr(model.rnn, f"bias_hh_l{layer}").any()
    state = (torch.rand(2, 3, 6),)
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.rnn.weight_ih_l1.zero_()
    _, after = model.step(captions(3, 1)[:, 0], state)
    assert torch.equal(after[0], state[0])  # Le et al. 2015: it remembers as long as nothing new comes


@pytest.mark.parametrize("norm", ["sqrt", "standard"])
def test_brightness_of_features_does_not_matter(norm):
    model = decoder(feature_norm=norm).eval()
    photos = features(5)
    assert torch.allclose(model.normalise(photos), model.normalise(photos * 37), atol=1e-5)


def test_the_square_root_and_unit_length():
    model = decoder(feature_norm="sqrt")
    photos = features(5)
    photos[0, 0] = -9.0
    normalised = model.normalise(photos)
    assert torch.allclose(normalised.norm(dim=1), torch.full((5,), 64.0))
    expected = photos[0].sign() * photos[0].abs().sqrt() / photos[0].abs().sum().sqrt() * 64
    assert torch.allclose(normalised[0], expected, atol=1e-5)
    assert normalised[0, 0] < 0
    nothing = model.normalise(torch.zeros(1, 4096))
    assert not nothing.any()
    assert torch.equal(decoder(feature_norm="none").normalise(photos), photos)


def test_standard_features_have_zero_mean_and_unit_variance():
    model = decoder(feature_norm="standard").train()
    photos = torch.rand(64, 4096, generator=torch.Generator().manual_seed(4)) + 1
    normalised = model.normalise(photos, training=True)
    assert torch.allclose(normalised.mean(0), torch.zeros(4096), atol=1e-3)
    assert torch.allclose(normalised.std(0), torch.ones(4096), atol=0.05)
    for _ in range(600):
        model.normalise(photos, training=True)
    assert torch.allclose(model.normalise(photos), normalised, atol=0.05)  # what it learnt is what it uses
    assert torch.equal(model.normalise(photos[:1])[0], model.normalise(photos)[0])
    alone = model.normalise(photos[:1], training=True)  # one photo has no variance
    assert torch.allclose(alone, model.normalise(photos[:1]))
    before = model.standard.mean.clone()
    model.eval().start(photos)
    assert torch.equal(model.standard.mean, before)
    model.train().start(photos.square())
    assert not torch.equal(model.standard.mean, before)  # the mode of the decoder is what `start` goes by


@pytest.mark.parametrize("norm", get_args(FeatureNorm))
def test_gradients_reach_an_encoder_where_features_are_zero(norm):
    model = decoder(feature_norm=norm).train()
    photos = features(4).requires_grad_()
    assert (photos == 0).any()
    model(photos, captions(4, 3)).square().sum().backward()
    assert photos.grad.isfinite().all()
    assert photos.grad.any()


def test_dropout_is_on_in_training_alone():
    model = decoder(dropout=0.5, layers=2)
    photos, tokens = features(2), captions(2, 5)
    model.train()
    assert not torch.equal(model(photos, tokens), model(photos, tokens))
    state = model.start(photos)
    assert not torch.equal(model.step(tokens[:, 0], state)[0], model.step(tokens[:, 0], state)[0])
    model.eval()
    assert torch.equal(model(photos, tokens), model(photos, tokens))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_sum(share):
    layer = Dropout(share)
    torch.manual_seed(0)
    x = torch.full((301, 1001), 2.0, requires_grad=True)
    found = layer(x)
    kept = found != 0
    assert float(kept.float().mean()) == pytest.approx(1 - share, abs=0.005)
    assert torch.allclose(found[kept], torch.tensor(2.0 / (1 - share)))
    for axis in (0, 1):  # no row or column is special: neighbours are drawn from one random number
        assert float(kept.float().mean(axis).std()) < 0.05
    assert abs(float((kept[:, :-1] & kept[:, 1:]).float().mean()) - (1 - share) ** 2) < 0.01
    found.sum().backward()
    assert torch.equal(x.grad, kept / (1 - share))
    assert not torch.equal(layer(x), found)
    assert layer.eval()(x) is x

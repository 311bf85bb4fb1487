"""The fused loss is that of torch's plain operations, and so is its gradient."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from captioner.training import loss as module
from captioner.training.loss import word_losses

WORDS, HIDDEN, VOCABULARY = 23, 6, 11


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(WORDS, HIDDEN, dtype=dtype, requires_grad=True)
    output = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
    return hidden, output, torch.randint(3, VOCABULARY, (WORDS,)), torch.randn(WORDS)


@pytest.mark.parametrize("rows", [1, 5, 23, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighed", [False, True])
def test_it_equals_the_plain_loss(monkeypatch: pytest.MonkeyPatch, rows: int, smoothing: float, weighed: bool) -> None:
    monkeypatch.setitem(module._ROWS, "cpu", rows)
    hidden, output, targets, weights = parts()
    leaves = [hidden, output.weight, output.bias]
    losses = F.cross_entropy(output(hidden).float(), targets, reduction="none", label_smoothing=smoothing)
    expected = (losses * weights if weighed else losses).sum()
    found = word_losses(hidden, output, targets, weights if weighed else None, smoothing=smoothing)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected.float(), rtol=1e-5)
    # The softmax is fp32 whatever the hidden states are.
    for one, other in zip(
        torch.autograd.grad(0.3 * found, leaves), torch.autograd.grad(0.3 * expected, leaves), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)


def test_words_that_are_never_drawn_get_nothing() -> None:
    hidden, output, targets, weights = parts()
    never = torch.tensor([0, 2])
    expected = (
        F.cross_entropy(output(hidden).float().index_fill(1, never, -torch.inf), targets, reduction="none") * weights
    ).sum()
    found = word_losses(hidden, output, targets, weights, never=never)
    assert torch.allclose(found, expected.float(), rtol=1e-6)
    gradients = torch.autograd.grad(found, [output.weight, output.bias])
    assert not any(gradient[never].any() for gradient in gradients)
    expecteds = torch.autograd.grad(expected, [output.weight, output.bias])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, expecteds, strict=True))


def test_under_autocast_it_is_as_exact_as_the_plain_loss() -> None:
    hidden, output, targets, _ = parts(torch.float32)
    exact = F.cross_entropy(output(hidden), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        found = word_losses(hidden, output, targets)
    assert found != exact
    assert found.item() == pytest.approx(exact.item(), rel=2e-3)
    for one, other in zip(
        torch.autograd.grad(found, [hidden, output.weight, output.bias]),
        torch.autograd.grad(exact, [hidden, output.weight, output.bias]),
        strict=True,
    ):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.02 * float(other.abs().max()))


def test_small_weights_and_large_scales_fit_into_fp16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, HIDDEN, requires_grad=True)
    output = nn.Linear(HIDDEN, 5000)
    targets, weights = torch.randint(0, 5000, (50,)), 1e-4 * torch.randn(50)
    exact = torch.autograd.grad(word_losses(hidden, output, targets, weights), [hidden, output.weight])
    scale = 65536.0  # the one that torch begins with: infinite in fp16
    with torch.autocast("cpu", torch.float16):
        loss = scale * word_losses(hidden, output, targets, weights)
    for one, other in zip(torch.autograd.grad(loss, [hidden, output.weight]), exact, strict=True):
        assert float((one / scale - other).norm()) < 0.01 * float(other.norm())


def test_without_gradients_none_are_computed() -> None:
    hidden, output, targets, _ = parts()
    with torch.no_grad():
        assert word_losses(hidden, output, targets).grad_fn is None


def test_logits_that_are_no_numbers_are_not_hidden() -> None:
    hidden, output, targets, _ = parts()
    with torch.no_grad():
        output.weight[3, 0] = torch.nan
    assert word_losses(hidden, output, targets).isnan()

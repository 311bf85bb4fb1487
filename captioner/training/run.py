"""The folder of a training run: its settings, its history, and the state of its optimiser.

Nothing is pickled: settings and history are JSON, the optimiser's moments are tensors in a `.safetensors` file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from captioner import checkpoint, files
from captioner.config import as_json, differences, from_json
from captioner.errors import CaptionerError, CheckpointError
from captioner.networks import weights

# Settings that may differ between two starts of one run: the places of files, whose contents are compared instead, the
# place where the run is reported, and how often it is saved.
_FREE = {
    "output",
    "tracking",
    "project",
    "checkpoint_minutes",
    "data.data",
    "data.images",
    "data.features",
    "encoder.weights",
}
_SETTINGS, _STATE, _HISTORY = "config.json", "training_state.safetensors", "training.json"
_LOCK = ".lock"
_PATIENCE = 1.0  # seconds in which the worker processes of a run that was killed end, and leave its lock
_AVERAGE = "average."  # what the names of averaged weights begin with


class Settings(Protocol):
    """The settings of a run: a dataclass with the folder that it writes to."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def output(self) -> Path:
        """The folder."""


@dataclass
class History:
    """How far a run has come; saved with every checkpoint."""

    epoch: int = 0  # epochs that are finished
    step: int = 0  # optimiser steps taken
    best_epoch: int = 0
    best_cider: float = -1.0
    seconds: float = 0.0  # spent in training and validation
    run_id: str | None = None  # of Weights & Biases
    epochs: list[dict[str, float]] = field(default_factory=list)  # losses and scores of each
    epoch_step: int = 0  # steps taken in the unfinished epoch
    loss_sum: float = 0.0  # of all words in those steps; of several processes, the first one's
    loss_words: float = 0.0  # number of those words
    processes: int = 1  # that share an epoch
    moments: int = 0  # how many weights the averaged ones are the mean of
    scale: dict[str, float] = field(default_factory=dict)  # of gradients in fp16

    def __post_init__(self) -> None:
        """Refuse numbers that contradict each other, as of a file that was edited by hand.

        Raises:
            CaptionerError: there are some.
        """
        for name in ("epoch", "step", "seconds", "epoch_step", "loss_words"):
            if not 0 <= getattr(self, name) < math.inf:
                raise CaptionerError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if len(self.epochs) != self.epoch:
            raise CaptionerError(f"epoch is {self.epoch}, and epochs holds {len(self.epochs)} records")
        if not 0 <= self.best_epoch <= self.epoch or not math.isfinite(self.best_cider):
            raise CaptionerError(f"the best of {self.epoch} epochs is {self.best_epoch}, with {self.best_cider}")
        if not all(math.isfinite(value) for record in self.epochs for value in record.values()):
            raise CaptionerError("epochs holds numbers that are not finite")
        if not math.isfinite(self.loss_sum):
            raise CaptionerError(f"loss_sum is {self.loss_sum}; expected a finite number")


@contextlib.contextmanager
def claimed(config: Settings, *, write: bool = True) -> Iterator[None]:
    """Keep the output folder for this run until the block ends, unless it belongs to a run with other settings.

    Args:
        config: all settings.
        write: whether this process holds the lock and writes; of several that train together, only the first does.

    Raises:
        CheckpointError: another process holds the folder, it has a run with other settings, or cannot be written.
    """
    with _locked(config.output) if write else contextlib.nullcontext():
        _compare(config)
        yield


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    lock = FileLock(output / _LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise CheckpointError(
            f"{output}: another process is training there; wait until it ends, or choose another --output"
        ) from None
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
        for name in output.glob(".*.json.*"):  # left by `files.write` in a process that was killed
            if name.suffix[1:].isdigit():
                name.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _compare(config: Settings) -> None:
    """Refuse a folder that holds a run with other settings."""
    path = config.output / _SETTINGS
    begun = [checkpoint.recover(config.output / name) for name in ("best", "last")]
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); choose another --output") from None
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error}); choose another --output") from None
    try:
        before = from_json(type(config), saved)
    except CaptionerError as error:
        raise CheckpointError(
            f"{path}: not the settings of a run that this version can go on with ({error}); choose another --output"
        ) from None
    different = [
        f"{name} was {old!r}, now {new!r}"
        for name, (old, new) in differences(before, config).items()
        if name not in _FREE
    ]
    if different:
        remedy = "" if any(begun) else ", or delete this one, in which no model is saved yet"
        raise CheckpointError(
            f"{config.output}: holds a run with other settings: {'; '.join(different[:3])}; "
            f"choose another --output{remedy}"
        )


def save_settings(config: Settings) -> None:
    """Write the settings into the folder of the run.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        files.write(config.output / _SETTINGS, json.dumps(as_json(config), indent=2) + "\n")
    except OSError as error:
        raise _unwritable(config.output, error) from None


def _unwritable(output: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{output}: cannot be written ({error.strerror or error}); choose another --output")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a file of the run, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    new = path.with_suffix(".new")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
        new.replace(path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error}); make room and run again") from None


def save_state(folder: Path, history: History, optimiser: Optimizer, average: Mapping[str, Tensor]) -> None:
    """Write history and optimiser beside a checkpoint, so that the run can go on from it.

    Args:
        folder: of the checkpoint, as `checkpoint.replacing` yields it.
        history: how far the run has come.
        optimiser: its moments are saved.
        average: averaged weights by name; empty where there are none.
    """
    moments = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, values in optimiser.state_dict()["state"].items()
        for name, tensor in values.items()
    }
    averaged = {f"{_AVERAGE}{name}": tensor.detach().cpu().contiguous() for name, tensor in average.items()}
    save_file({**moments, **averaged}, folder / _STATE)
    saved = {**dataclasses.asdict(history), "sha256": files.sha256(folder / _STATE)}
    files.write(folder / _HISTORY, json.dumps(saved, indent=2) + "\n")


def load_state(folder: Path, optimiser: Optimizer) -> tuple[History, dict[str, Tensor]]:
    """Read the files of `save_state`, and fill an optimiser of the same network.

    Returns:
        The history, and the averaged weights by name.

    Raises:
        CheckpointError: a file is missing, damaged or altered.
    """
    try:
        saved = json.loads((folder / _HISTORY).read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise CheckpointError(f"{_HISTORY} is no object")
        if saved.pop("sha256") != files.sha256(folder / _STATE):
            raise CheckpointError(f"{_STATE} is altered")
        history = from_json(History, saved)
        tensors = weights.read(folder / _STATE)
        averaged = {name.removeprefix(_AVERAGE): tensors[name] for name in tensors if name.startswith(_AVERAGE)}
        moments = _moments({name: tensors[name] for name in tensors if not name.startswith(_AVERAGE)}, optimiser)
    except (OSError, KeyError, ValueError, RecursionError, CaptionerError) as error:
        reason = f"{_HISTORY} has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{folder}: the state of the training cannot be read ({reason}); "
            f"{folder.with_name('best')} can still caption: choose another --output to train anew"
        ) from None
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    # Fused Adam reads a parameter and its moments in the order of memory, which is channels-last for those of a CNN.
    for parameter, values in optimiser.state.items():
        values |= {
            name: torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            for name, tensor in values.items()
            if tensor.shape == parameter.shape
        }
    return history, averaged


def _moments(tensors: Mapping[str, Tensor], optimiser: Optimizer) -> dict[int, dict[str, Tensor]]:
    """Tensors by parameter and name, as an optimiser has them.

    Raises:
        CaptionerError: they are not those of the optimiser's parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, kind = name.partition(".")
        number = int(index) if index.isdecimal() and len(index) < 10 else len(parameters)
        if number >= len(parameters) or tensor.shape not in (parameters[number].shape, ()):
            raise CaptionerError(f"{_STATE}: {name[:60]} {tuple(tensor.shape)} is not of this network")
        moments.setdefault(number, {})[kind] = tensor
    if len({frozenset(values) for values in moments.values()}) > 1:
        raise CaptionerError(f"{_STATE}: some parameters have moments that others lack")
    return moments

"""The folder of a training run: its settings, how far it has come, and what is needed to go on.

Nothing is pickled: settings and history are JSON, the optimiser's moments are tensors in a `.safetensors` file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from captioner import checkpoint, files
from captioner.config import DistillationConfig, TrainingConfig
from captioner.datasets.annotations import Example
from captioner.errors import CaptionerError, CheckpointError
from captioner.networks import weights

# Settings that may differ between two starts of one run: where things lie (what they hold is compared by its content),
# and what is reported where.
_FREE = {"output", "tracking", "project", "data.data", "data.images", "data.features", "encoder.weights"}
_FREE |= {"photos", "teacher"}  # of a distillation
_STATE, _HISTORY = "training_state.safetensors", "training.json"


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


def claim(config: TrainingConfig | DistillationConfig, *, write: bool) -> dict[str, Any]:
    """Take the output folder for this run; a run with other settings that has a checkpoint there is not touched.

    Args:
        config: all settings.
        write: whether this process is the one that notes them down.

    Returns:
        The settings in JSON's types.
    """
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    path = config.output / "config.json"
    begun = [checkpoint.recover(config.output / name) for name in ("best", "last")]
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged, not JSON ({error}); choose another --output") from None
        if before.keys() != settings.keys():
            raise CheckpointError(f"{path}: is not of a run of this kind; choose another --output")
        different = [
            f"{key} was {old!r}, now {new!r}"
            for key, (old, new) in _differences(before, settings).items()
            if key not in _FREE
        ]
        if different and any(begun):
            raise CheckpointError(
                f"{config.output}: holds a run with other settings: {'; '.join(different[:3])}; choose another --output"
            )
    if not write:
        return settings
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{config.output}: cannot be written ({error.strerror}); choose another --output"
        ) from None
    return settings


def save_state(folder: Path, history: History, optimiser: Optimizer) -> None:
    """Write what is needed to go on beside a checkpoint.

    Args:
        folder: of the checkpoint; best the one that `checkpoint.replacing` yields.
        history: how far the run has come.
        optimiser: its moments are saved.
    """
    moments = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, values in optimiser.state_dict()["state"].items()
        for name, tensor in values.items()
    }
    save_file(moments, folder / _STATE)
    saved = {**dataclasses.asdict(history), "sha256": files.sha256(folder / _STATE)}
    files.write(folder / _HISTORY, json.dumps(saved, indent=2) + "\n")


def load_state(folder: Path, optimiser: Optimizer) -> History:
    """Read what `save_state` wrote, and fill an optimiser of the same network.

    Raises:
        CheckpointError: a file is missing, damaged or altered.
    """
    try:
        saved = json.loads((folder / _HISTORY).read_text(encoding="utf-8"))
        if saved.pop("sha256") != files.sha256(folder / _STATE):
            raise CheckpointError(f"{_STATE} is altered")
        history, tensors = History(**saved), weights.read(folder / _STATE)
    except (OSError, KeyError, AttributeError, ValueError, TypeError, CaptionerError) as error:
        raise CheckpointError(
            f"{folder}: the state of the training cannot be read ({error}); "
            f"{folder.with_name('best')} can still caption: choose another --output to train anew"
        ) from None
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, kind = name.split(".", 1)
        moments.setdefault(int(index), {})[kind] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    # Fused Adam pairs weights and moments by their place in memory, where those of a CNN are channels last.
    for parameter, values in optimiser.state.items():
        values |= {
            name: torch.empty_like(parameter, requires_grad=False).copy_(tensor)
            for name, tensor in values.items()
            if tensor.shape == parameter.shape
        }
    return history


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the photos' ids, captions and splits: a run goes on only with what it began with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.image_id, example.split, *example.captions]).encode())
    return digest.hexdigest()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by their dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= {f"{key}.{inner}": pair for inner, pair in _differences(before, after).items()}
        elif before != after:
            found[key] = (before, after)
    return found

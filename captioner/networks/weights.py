"""Files of tensors as torch's tensors: read without pickle, loaded into networks, and identified by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from captioner.errors import CheckpointError, WeightsError
from captioner.tensors import Array, below, differences

__all__ = ["arrays", "below", "differences", "fill", "fingerprint", "read", "tensors_of"]


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or from a `.pth` file that holds tensors and nothing else.

    Raises:
        WeightsError: the file cannot be read, holds anything that could run code, or numbers that are not finite.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: cannot be read as weights ({reason}); delete it and fetch it again") from None
    except Exception as error:  # a pickle that weights_only refuses: the type depends on torch's version
        raise WeightsError(
            f"{path}: not a plain file of tensors ({type(error).__name__}); save a state dict, best as .safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: not a state dict (names -> tensors); save `network.state_dict()`")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: {name} holds numbers that are not finite; give other weights")
    return state


def fill(module: nn.Module, state: Mapping[str, Array] | Mapping[str, Tensor], source: str) -> None:
    """Load tensors into a module after comparing names, shapes and types.

    Raises:
        CheckpointError: something differs; the message begins with `source` and says what.
    """
    if different := differences(module.state_dict(), state):
        raise CheckpointError(f"{source}: does not fit its config.json: {different}; fetch the model again")
    module.load_state_dict(tensors_of(state))


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The arrays of a saved model as torch's tensors, which share their memory; tensors stay as they are."""
    return {name: each if isinstance(each, Tensor) else torch.from_numpy(each) for name, each in state.items()}


def arrays(state: Mapping[str, Tensor]) -> dict[str, Array]:
    """A network's tensors as arrays, as a saved model has them."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.items()}


def fingerprint(state: Mapping[str, Any]) -> str:
    """SHA-256 of the names, types, shapes and values of tensors (or arrays): equal for equal weights in any file.

    Counters of training steps are passed over: older files lack them, and evaluation never reads them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(state).items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

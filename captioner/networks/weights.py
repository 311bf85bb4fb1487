"""Files of tensors: read without pickle, packed into 8 bits, compared, and identified by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from captioner.errors import WeightsError

#: Models that come with this package.
PRETRAINED = Path(__file__).parents[1] / "pretrained"

_STEPS = 127  # of 8 bits, to either side of 0
_STEP = ".step"  # behind the name of a packed tensor: what one step is worth, a number a row


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file, or from a `.pth` file that holds tensors and nothing else.

    Raises:
        WeightsError: the file cannot be read, or holds anything that could run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path}: cannot be read as weights ({reason}); delete it and fetch it again") from None
    except Exception as error:  # what weights_only refuses to unpickle: the type depends on torch's version
        raise WeightsError(
            f"{path}: not a plain file of tensors ({type(error).__name__}); save a state dict, best as .safetensors"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: not a state dict (names -> tensors); save `network.state_dict()`")
    return state


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values: equal for equal weights, whatever file they came in.

    Counters of training steps are passed over: older files lack them, and evaluation never reads them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(template: Mapping[str, Tensor], state: Mapping[str, Tensor], passed_over: Collection[str] = ()) -> str:
    """Say how tensors differ from those that a network needs.

    Args:
        template: the network's own state dict.
        state: what was read.
        passed_over: names that may be there, or be lacking, without harm.

    Returns:
        The first three differences in names and shapes, and the number of the others; empty if there are none.
    """
    found = [f"{name} is missing" for name in template if name not in state and name not in passed_over]
    found += [f"{name} is unknown" for name in state if name not in template and name not in passed_over]
    found += [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(template[name].shape)}"
        for name in template
        if name in state and state[name].shape != template[name].shape
    ]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in 8 bits, a quarter of their size: each row's largest number becomes 127 or -127.

    Everything else (biases, statistics, counters) stays as it is. `unpack` gives numbers that are at most half a step
    away, and packing those again changes nothing.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        packed[name] = tensor
        if tensor.is_floating_point() and tensor.ndim > 1:
            rows = tensor.float().flatten(1)
            step = (rows.abs().amax(1) / _STEPS).clamp_min(torch.finfo(torch.float32).tiny)
            packed[name] = (rows / step[:, None]).round().to(torch.int8).view(tensor.shape)
            packed[name + _STEP] = step
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` has made, as 32-bit numbers again; tensors that are not packed stay as they are."""
    state: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name + _STEP in packed:
            step = packed[name + _STEP]
            state[name] = tensor.float() * step.view(-1, *[1] * (tensor.ndim - 1))
        elif not name.endswith(_STEP):
            state[name] = tensor
    return state


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

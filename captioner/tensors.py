"""Files of tensors in the safetensors format, without torch: described before they are read, unpacked from 8 bits."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from captioner.errors import WeightsError

Array = npt.NDArray[Any]
_Value = TypeVar("_Value")

_LARGEST_HEADER = 8 << 20  # bytes
STEP = ".step"  # behind the name of a packed tensor: what one step is worth, a number a row

#: The names of types in a safetensors header, and their size in bytes.
_TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}


class Entry(NamedTuple):
    """How a tensor lies in a file."""

    dtype: str  # as numpy and torch call it
    shape: tuple[int, ...]
    begin: int  # its first byte, from the beginning of the file
    length: int  # in bytes


class _Described(Protocol):
    """A tensor of torch, an array of numpy, or an `Entry`."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


def header(path: Path) -> dict[str, Entry]:
    """Describe the tensors of a `.safetensors` file; none of them is read.

    Raises:
        WeightsError: the file cannot be read, or its header and its size contradict each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError("it does not begin with a header")
            described = json.loads(file.read(length).decode("utf-8"))
        if not isinstance(described, dict):
            raise ValueError("its header is not an object")
        described.pop("__metadata__", None)
        entries = {name: _entry(name, value, 8 + length) for name, value in described.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].length)):
            if entry.begin != end:
                raise ValueError(f"{name[:60]!r} does not begin where the tensor before it ends")
            end += entry.length
        if end != size:
            raise ValueError(f"it has {size:,} bytes, and its header describes {end:,}")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"{path}: cannot be read as weights ({reason}); fetch it again") from None
    return entries


def _entry(name: str, value: Any, start: int) -> Entry:
    """One line of a header, checked."""
    try:
        dtype, size = _TYPES[value["dtype"]]
        shape, (begin, end) = value["shape"], value["data_offsets"]
        if not all(type(each) is int and 0 <= each < 1 << 48 for each in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name[:60]!r} is described as {value!r:.80}") from None
    if end - begin != math.prod(shape) * size:
        raise ValueError(f"{name[:60]!r} is {tuple(shape)} of {dtype}, and has {end - begin:,} bytes")
    return Entry(dtype, tuple(shape), start + begin, end - begin)


def read(path: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """Read tensors.

    Args:
        path: a `.safetensors` file.
        names: those that are wanted; by default all.

    Raises:
        WeightsError: the file cannot be read, holds numbers that are not finite, or types that numpy lacks.
    """
    entries = header(path)
    return dict(each(path, {name: entries[name] for name in (entries if names is None else names)}))


def each(path: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Array]]:
    """Read tensors one after another.

    Args:
        path: a `.safetensors` file.
        entries: of its `header`.

    Raises:
        WeightsError: see `read`.
    """
    try:
        with path.open("rb") as file:
            for name in entries:
                entry = entries[name]
                if entry.dtype == "bfloat16":
                    raise WeightsError(f"{path}: {name} is bfloat16; expected float32; fetch it again")
                file.seek(entry.begin)
                # Little-endian, as the format says.
                array = np.fromfile(file, np.dtype(entry.dtype).newbyteorder("<"), math.prod(entry.shape))
                if not finite(array):
                    raise WeightsError(f"{path}: {name} holds numbers that are not finite; fetch it again")
                yield name, array.astype(entry.dtype, copy=False).reshape(entry.shape)
    except (OSError, ValueError) as error:  # the file was replaced or cut since its header was read
        raise WeightsError(f"{path}: cannot be read as weights ({error}); fetch it again") from None


def finite(array: Array) -> bool:
    """Whether all numbers of an array are finite; looked at in parts, so that little memory is needed."""
    if array.dtype.kind not in "fc":
        return True
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[at : at + (1 << 18)]).all()) for at in range(0, flat.size, 1 << 18))


def differences(
    template: Mapping[str, _Described], state: Mapping[str, _Described], passed_over: Collection[str] = ()
) -> str:
    """Say how tensors differ from those that a network needs.

    Args:
        template: the network's own tensors.
        state: the tensors that were read.
        passed_over: names that may be there, or be lacking, without harm.

    Returns:
        The first three differences in names, shapes and types, and the number of the others; empty if there are none.
        One type of real floating-point numbers may stand for another.
    """
    found = [f"{name} is missing" for name in template if name not in state and name not in passed_over]
    found += [f"{name} is unknown" for name in state if name not in template and name not in passed_over]
    for name in template:
        if name not in state:
            continue
        given, needed = state[name], template[name]
        if tuple(given.shape) != tuple(needed.shape):
            found.append(f"{name} is {tuple(given.shape)} instead of {tuple(needed.shape)}")
        elif _kind(given) != _kind(needed):
            found.append(f"{name} is {_type(given)} instead of {_type(needed)}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _type(tensor: _Described) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(tensor: _Described) -> str:
    return _type(tensor).removeprefix("b").rstrip("0123456789")  # "bfloat16" is a float as well


def unpack(packed: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors in 8 bits as 32-bit numbers again, number times step of the row; other tensors stay as they are.

    The steps of a row may be negative, as those of a graph are whose batch normalisation turns the sign.
    """
    state: dict[str, Array] = {}
    for name, array in packed.items():
        if name + STEP in packed:
            step = packed[name + STEP].astype(np.float32, copy=False)
            state[name] = array.astype(np.float32) * step.reshape(-1, *[1] * (array.ndim - 1))
        elif not name.endswith(STEP):
            state[name] = array
    return state


def below(prefix: str, state: Mapping[str, _Value]) -> dict[str, _Value]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

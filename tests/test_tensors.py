"""Files of tensors without torch: described before they are read, packed into 8 bits, and refused when they lie."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from captioner import tensors
from captioner.errors import WeightsError


def state() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "matrix": random.normal(size=(4, 3)).astype(np.float32),
        "half": np.arange(5, dtype=np.float16),
        "codes": np.arange(-3, 3, dtype=np.int8).reshape(3, 2),
        "count": np.array(7),
        "nothing": np.zeros((0, 3), np.float32),
    }


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state(), path, metadata={"format": "np"})
    described = tensors.header(path)
    assert {name: (each.dtype, each.shape) for name, each in described.items()} == {
        name: (array.dtype.name, array.shape) for name, array in state().items()
    }
    for name, each in described.items():
        assert path.read_bytes()[each.begin : each.begin + each.length] == state()[name].tobytes()
    found = tensors.read(path)
    assert found.keys() == state().keys()
    for name, array in state().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)
    assert list(tensors.read(path, ["half"])) == ["half"]


def described(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (one(), 8, None),
        ({}, 0, None),
        (one(), 7, "it has [0-9]+ bytes, and its header describes"),
        (one(), 9, "it has [0-9]+ bytes, and its header describes"),
        (one(shape=[3]), 8, r"'x' is \(3,\) of float32, and has 8 bytes"),
        (one(shape=[2**62]), 8, "'x' is described as"),
        (one(shape=[2**40, 2**40]), 8, "'x' is .* of float32, and has 8 bytes"),
        (one(shape=[10**19]), 8, "'x' is described as"),
        (one(shape=[-2]), 8, "'x' is described as"),
        (one(shape=[2.0]), 8, "'x' is described as"),
        (one(shape=[True]), 8, "'x' is described as"),
        (one(shape="22"), 8, "'x' is described as"),
        (one(shape=5), 8, "'x' is described as"),
        (one(shape=[1] * 9), 8, "'x' is described as"),
        (one(dtype="F8_E5M2"), 8, "'x' is described as"),
        (one(dtype=["F32"]), 8, "'x' is described as"),
        (one(offsets=[0]), 8, "'x' is described as"),
        (one(offsets=[8, 16]), 16, "'x' does not begin where the tensor before it ends"),
        (one(offsets=[8, 0]), 8, "'x' is .2,. of float32, and has -8 bytes"),
        (one() | {"y": one()["x"]}, 8, "'y' does not begin where"),
        ({"x": 3}, 0, "'x' is described as 3"),
        ({"\x1b[31m": 3}, 0, r"is described as 3"),
        ([], 0, "its header is not an object"),
        (b"{", 0, "cannot be read as weights"),
        (b"[" * 50_000, 0, "cannot be read as weights"),
        (b"\xff\xff", 0, "cannot be read as weights"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: Any, data: int, said: str | None) -> None:
    path = described(tmp_path / "a.safetensors", header, bytes(data))
    if said is None:
        tensors.read(path)
        return
    with pytest.raises(WeightsError, match=r"a\.safetensors: cannot be read as weights .*; fetch it again$") as caught:
        tensors.read(path)
    assert caught.match(said)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_no_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="it does not begin with a header"):
        tensors.header(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="No such file"):
        tensors.header(tmp_path / "b.safetensors")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numbers_that_are_not_finite(tmp_path: Path, number: float, dtype: Any) -> None:
    array = np.zeros(600_000, dtype)
    array[-1] = number
    save_file({"x": array}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors: x holds numbers that are not finite; fetch it again"):
        tensors.read(tmp_path / "a.safetensors")


def test_a_type_that_numpy_lacks(tmp_path: Path) -> None:
    path = described(tmp_path / "a.safetensors", one("BF16", [4]), bytes(8))
    assert tensors.header(path)["x"].dtype == "bfloat16"
    with pytest.raises(WeightsError, match="x is bfloat16; expected float32"):
        tensors.read(path)


# 8 bits ------------------------------------------------------------------------------------------------------------


def test_the_step_of_a_row_may_be_negative() -> None:
    packed = {"x": np.array([[1, -2], [3, 4]], np.int8), "x.step": np.array([-0.5, 2], np.float32)}
    assert tensors.unpack(packed)["x"].tolist() == [[-0.5, 1.0], [6.0, 8.0]]


def test_tensors_that_are_not_packed_stay_as_they_are() -> None:
    given = {"matrix": np.ones((4, 9), np.float32), "bias": np.ones(4, np.float32)}
    assert all(np.array_equal(tensors.unpack(given)[name], given[name]) for name in given)


def test_below() -> None:
    assert tensors.below("a.", {"a.b": 1, "a.a.c": 2, "ab": 3, "b.a.d": 4}) == {"b": 1, "a.c": 2}

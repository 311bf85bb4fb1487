"""Files of tensors: what is read, what is refused, and what a fingerprint means."""

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from captioner.errors import CheckpointError, WeightsError
from captioner.networks import weights


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(4, 3, generator=generator),
        "layer.bias": torch.zeros(4, dtype=torch.float16),
        "norm.num_batches_tracked": torch.tensor(7),
        "scale": torch.ones(2, dtype=torch.bfloat16),
    }


def test_every_kind_of_file_says_the_same(tmp_path):
    save_file(state(), tmp_path / "a.safetensors")
    torch.save(state(), tmp_path / "a.pth")
    torch.save(state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "old.pt"):
        found = weights.read(tmp_path / name)
        assert found.keys() == state().keys()
        assert all(torch.equal(found[key], value) for key, value in state().items())
        assert weights.fingerprint(found) == weights.fingerprint(state())


def test_a_fingerprint_is_of_names_types_shapes_and_values():
    original = weights.fingerprint(state())
    assert len(original) == 64
    assert weights.fingerprint(dict(reversed(state().items()))) == original
    changed = []
    changed.append(state() | {"scale": torch.ones(2)})
    changed.append(state() | {"layer.weight": state()["layer.weight"].reshape(3, 4)})
    changed.append(state() | {"layer.weight": state()["layer.weight"] + 1e-6})
    changed.append({name.replace("scale", "scales"): tensor for name, tensor in state().items()})
    changed.append({name: tensor for name, tensor in state().items() if name != "scale"})
    assert len({original, *(weights.fingerprint(each) for each in changed)}) == 6
    strided = state()["layer.weight"].t().contiguous().t()  # another layout in memory, the same numbers
    assert weights.fingerprint(state() | {"layer.weight": strided}) == original
    learning = state()["layer.weight"].requires_grad_()
    assert weights.fingerprint(state() | {"layer.weight": learning}) == original
    assert weights.fingerprint({}) != weights.fingerprint({"": torch.empty(0)})


def test_code_in_a_file_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"layer": torch.ones(2), "attack": Attack()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(
            WeightsError, match=rf"{name}: not a plain file of tensors \(\w+\); save a state dict, best"
        ):
            weights.read(tmp_path / name)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_truncated_files(tmp_path, share):
    save_file(state(), tmp_path / "a.safetensors")
    torch.save(state(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(WeightsError, match=rf"^[^\n]*{name}: (cannot be read as weights|not a plain file)[^\n]*$"):
            weights.read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", bytes(100)])
def test_other_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=rf"^[^\n]*{name}: (cannot be read as weights|not a )[^\n]*$"):
        weights.read(tmp_path / name)


def test_a_missing_file(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        with pytest.raises(WeightsError, match=rf"{name}: cannot be read as weights \(.*No such file"):
            weights.read(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": state()}, {"layer": 3}, torch.ones(2)])
def test_tensors_in_another_arrangement(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: not a state dict \(names -> tensors\); save `network\.state_dict"):
        weights.read(tmp_path / "a.pth")


def test_differences():
    template = {"a": torch.ones(2, 3), "b": torch.ones(4), "count": torch.ones(())}
    assert weights.differences(template, template) == ""
    assert weights.differences(template, {"a": torch.ones(3, 2), "c": torch.ones(1)}, passed_over={"count"}) == (
        "b is missing; c is unknown; a is (3, 2) instead of (2, 3)"
    )
    assert weights.differences(template, template | {"head": torch.ones(1)}, passed_over={"head"}) == ""
    many = {f"x{n}": torch.ones(1) for n in range(5)}
    assert weights.differences(template, template | many).endswith("x2 is unknown and 2 more")
    assert weights.differences({"count": torch.ones(())}, {"count": torch.ones(2)}, {"count"}).startswith(
        "count is (2,)"
    )


def test_differences_in_type():
    template = {"a": torch.ones(2), "count": torch.tensor(1)}
    assert weights.differences(template, template | {"a": torch.ones(2).bfloat16()}) == ""
    assert weights.differences(template, template | {"a": torch.ones(2).long()}) == "a is int64 instead of float32"
    assert weights.differences(template, template | {"a": torch.ones(2, dtype=torch.complex64)}) == (
        "a is complex64 instead of float32"
    )
    assert weights.differences(template, template | {"count": torch.tensor(1.0)}) == "count is float32 instead of int64"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_numbers_that_are_not_finite(tmp_path, name, number):
    broken = state() | {"layer.weight": torch.tensor([1.0, number])}
    save_file(broken, tmp_path / name) if name.endswith("s") else torch.save(broken, tmp_path / name)
    with pytest.raises(WeightsError, match=rf"{name}: layer\.weight holds numbers that are not finite; give other"):
        weights.read(tmp_path / name)


def test_arrays_and_back():
    tensors = {"a": torch.randn(2, 3).t(), "count": torch.tensor(3)}
    arrays = weights.arrays(tensors)
    assert {name: type(array) for name, array in arrays.items()} == dict.fromkeys(tensors, np.ndarray)
    back = weights.tensors_of(arrays)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert weights.fingerprint(arrays) == weights.fingerprint(tensors)


def test_a_network_is_filled():
    layer = torch.nn.Linear(3, 2)
    given = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    weights.fill(layer, given, "model")
    assert layer(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    with pytest.raises(CheckpointError, match=r"^model: does not fit its config.json: bias is missing; fetch"):
        weights.fill(layer, {"weight": given["weight"]}, "model")
    with pytest.raises(CheckpointError, match=r"bias is int64 instead of float32"):
        weights.fill(layer, given | {"bias": np.zeros(2, np.int64)}, "model")

"""Files of tensors: what is read, what is refused, and what a fingerprint means."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from captioner.errors import WeightsError
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


def test_below():
    assert weights.below("a.", {"a.b": 1, "a.a.c": 2, "ab": 3, "b.a.d": 4}) == {"b": 1, "a.c": 2}


def test_packed_numbers_are_at_most_half_a_step_away() -> None:
    state = {
        "kernel": torch.randn(7, 5, 3, 3) * torch.logspace(-4, 2, 7).view(7, 1, 1, 1),
        "matrix": torch.randn(4, 9),
        "zeros": torch.cat([torch.zeros(1, 6), torch.ones(1, 6)]),
        "bias": torch.randn(4),
        "count": torch.tensor(3),
        "ids": torch.arange(6).view(2, 3),
    }
    packed = weights.pack(state)
    assert {name for name, tensor in packed.items() if tensor.dtype == torch.int8} == {"kernel", "matrix", "zeros"}
    back = weights.unpack(packed)
    assert list(back) == list(state)
    for name in ("bias", "count", "ids", "zeros"):
        assert torch.equal(back[name], state[name])
    for name in ("kernel", "matrix"):
        largest = state[name].abs().flatten(1).amax(1)
        error = (back[name] - state[name]).abs().flatten(1).amax(1)
        assert (error <= largest / 127 / 2 * 1.0001).all()
        assert (error > largest / 127 / 20).all()  # of 8 bits it is
    again = weights.unpack(weights.pack(back))
    assert all(torch.equal(again[name], back[name]) for name in back)


def test_what_is_not_packed_stays_as_it_is() -> None:
    state = {"matrix": torch.randn(4, 9), "bias": torch.randn(4)}
    assert all(torch.equal(weights.unpack(state)[name], state[name]) for name in state)

"""A graph from a stranger: read as the onnx package reads it, and refused where it does what none of ours does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from captioner import graphs, tensors
from captioner.errors import CheckpointError

onnx = pytest.importorskip("onnx")
from google.protobuf.message import DecodeError  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def external(entry: tensors.Entry, name: str, shape: tuple[int, ...] | None = None, **changed: str) -> Any:
    """An initializer whose numbers are in model.safetensors."""
    kinds = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8}
    tensor = TensorProto(name=name, data_type=kinds[entry.dtype], dims=shape or entry.shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": "model.safetensors", "offset": str(entry.begin), "length": str(entry.length), **changed}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, tensors.Entry]:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones((3, 2), np.float32), "codes": np.ones((4, 3), np.int8)}, path)
    return tensors.header(path)


def model(weights: dict[str, tensors.Entry], change: Callable[[Any], Any] = lambda proto: None) -> Any:
    """A graph like ours: weights beside it, a few small constants within."""
    nodes = [
        helper.make_node("Unsqueeze", ["x", "shape"], ["x1"]),
        helper.make_node("Cast", ["x1"], ["x2"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x2", "w"], ["y0"]),
        helper.make_node("MaxPool", ["y0"], ["y1"], kernel_shape=[3, 3], auto_pad="NOTSET", ceil_mode=1),
        helper.make_node("MatMulIntegerToFloat", ["y1", "codes"], ["y"], domain="com.microsoft"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [
            external(weights["w"], "w"),
            external(weights["codes"], "codes", (12,)),
            numpy_helper.from_array(np.array([0, -1]), "shape"),
            helper.make_tensor("scale", TensorProto.FLOAT, [2], [0.5, 1.0]),
            helper.make_tensor("zero", TensorProto.INT8, [], [-3]),
            numpy_helper.from_array(np.float32(2), "two"),
        ],
        value_info=[helper.make_tensor_value_info("x1", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    change(proto)
    return proto


def write(path: Path, proto: Any) -> Path:
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def test_our_graphs_are_read(tmp_path: Path, weights: dict[str, tensors.Entry]) -> None:
    found = graphs.check(write(tmp_path / "graph.onnx", model(weights)), weights)
    assert found.operators == (
        *(("", name) for name in ("Unsqueeze", "Cast", "MatMul", "MaxPool")),
        ("com.microsoft", "MatMulIntegerToFloat"),
    )
    assert [(each.name, each.dtype, each.shape, each.external is not None) for each in found.initializers] == [
        ("w", "float32", (3, 2), True),
        ("codes", "int8", (12,), True),
        ("shape", "int64", (2,), False),
        ("scale", "float32", (2,), False),
        ("zero", "int8", (), False),
        ("two", "float32", (), False),
    ]
    assert found.constants == ()


def operator(name: str, domain: str = "", **attributes: Any) -> Callable[[Any], None]:
    return lambda proto: proto.graph.node.append(helper.make_node(name, ["x"], ["z"], domain=domain, **attributes))


def weight(**changed: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        places = {each.key: each for each in proto.graph.initializer[0].external_data}
        for key, value in changed.items():
            if key in places:
                places[key].value = value
            else:
                proto.graph.initializer[0].external_data.add(key=key, value=value)

    return change


def add(**fields: Any) -> Callable[[Any], None]:
    return lambda proto: proto.graph.initializer.append(TensorProto(**fields))


def inner() -> Any:
    return helper.make_graph([], "inner", [], [])


def function(proto: Any) -> None:
    proto.functions.append(helper.make_function("d", "f", [], [], [], [helper.make_opsetid("", 21)]))


def constant_elsewhere(proto: Any) -> None:
    held = proto.graph.node[1].attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    held.t.CopyFrom(proto.graph.initializer[0])


def sparse(proto: Any) -> None:
    proto.graph.sparse_initializer.add()


def training(proto: Any) -> None:
    proto.training_info.add()


def twice(proto: Any) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (operator("Loop", body=inner()), "a node 'Loop' has a field 6"),
        (operator("If", branches=[inner()]), "a node 'If' has a field 11"),
        (operator("Expand"), "the operator 'Expand', which captioner does not export"),
        (operator("MatMulIntegerToFloat"), "the operator 'MatMulIntegerToFloat', which"),
        (operator("MatMul", "evil"), "the operator 'evil.MatMul', which"),
        (operator("\x1b[31m\u202eMatMul"), r"the operator '.x1b.31m.u202eMatMul', which"),
        (lambda proto: proto.opset_import.add(domain="evil", version=1), "operators of 'evil'"),
        (function, "the model has a field 25"),
        (training, "the model has a field 20"),
        (sparse, "the graph has a field 15"),
        (weight(location="../../etc/passwd"), "'w' is in '../../etc/passwd'; expected 'model.safetensors'"),
        (weight(location="/etc/passwd"), "'w' is in '/etc/passwd'"),
        (weight(location="./model.safetensors"), "'w' is in './model.safetensors'"),
        (weight(location="*/_ORT_MEM_ADDR_/*"), "'w' is in "),
        (weight(offset="0"), "'w' is at .*'offset': '0'"),
        (weight(offset="-8"), "'w' is at .*'offset': '-8'"),
        (weight(offset="9" * 30), "'w' is at "),
        (weight(length="4"), "'w' is at .*'length': '4'"),
        (weight(length="1000000000000"), "'w' is at "),
        (weight(basepath="/etc"), "'w' is at "),
        (add(name="v", data_location=1, data_type=1, dims=[2]), "'v' is in ''; expected 'model.safetensors'"),
        (lambda proto: setattr(proto.graph.initializer[0], "name", "v"), "'v' is not in model.safetensors"),
        (lambda proto: proto.graph.initializer[0].dims.append(2**31), "'w' is .3, 2, 2147483648. of float32, and in "),
        (lambda proto: setattr(proto.graph.initializer[0], "data_type", 6), "'w' is .3, 2. of int32, and in"),
        (lambda proto: setattr(proto.graph.initializer[0], "raw_data", b"1234"), "the tensor 'w' in two places"),
        (twice, "two weights of one name"),
        (add(name="v", data_type=1, dims=[2**62]), "the tensor 'v' of the shape"),
        (add(name="v", data_type=1, dims=[-1]), "the tensor 'v' of the shape"),
        (add(name="v", data_type=1, dims=[1 << 20] * 3), "the tensor 'v' of [0-9,]+ bytes within the graph"),
        (
            add(name="v", data_type=1, dims=[2048], raw_data=bytes(8192)),
            "the tensor 'v' of 8,192 bytes within the graph",
        ),
        (add(name="v", data_type=1, dims=[2], raw_data=bytes(4)), "the tensor 'v' of .2,. with 1 numbers"),
        (add(name="v", data_type=1, dims=[2], float_data=[1.0]), "the tensor 'v' of .2,. with 1 numbers"),
        (add(name="v", data_type=8, dims=[1], string_data=[b"x"]), "a tensor has a field 6"),
        (add(name="v", data_type=14, dims=[1]), "the tensor 'v' of a type with the number 14"),
        (add(name="v", dims=[1]), "the tensor 'v' of a type with the number 0"),
        (constant_elsewhere, "a constant whose numbers are in another file"),
        (lambda proto: proto.ClearField("graph"), "no graph"),
    ],
)
def test_hostile_graphs(
    tmp_path: Path, weights: dict[str, tensors.Entry], change: Callable[[Any], Any], said: str
) -> None:
    path = write(tmp_path / "graph.onnx", model(weights, change))
    with pytest.raises(CheckpointError, match=said) as caught:
        graphs.check(path, weights)
    message = str(caught.value)
    assert message.startswith(f"{path}: not a graph that captioner exports (")
    assert message.endswith("); export the model again: captioner export")
    assert message.isprintable()


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xff" * 20,
        b"\x08",
        b"\x0b",
        b"\x00",
        b"hello",
        b"\x3a\x05ab",
    ],
)
def test_bytes_that_are_no_graph(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a graph that captioner exports"):
        graphs.check(write(tmp_path / "graph.onnx", content), {})


def test_a_part_that_stands_twice(tmp_path: Path, weights: dict[str, tensors.Entry]) -> None:
    """Other readers would merge the two, so that a check of one of them says nothing."""
    content = model(weights).SerializeToString()
    with pytest.raises(CheckpointError, match="the model has ir_version twice"):
        graphs.check(write(tmp_path / "graph.onnx", content + content), weights)
    graph = onnx.ModelProto(graph=model(weights).graph).SerializeToString()
    with pytest.raises(CheckpointError, match="the model has graph twice"):
        graphs.check(write(tmp_path / "graph.onnx", content + graph), weights)


def test_large_graphs_end_soon(tmp_path: Path, weights: dict[str, tensors.Entry]) -> None:
    path = tmp_path / "graph.onnx"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(CheckpointError, match="more than 16,777,216 bytes"):
        graphs.check(path, weights)
    many = model(weights, lambda proto: proto.graph.node.extend([helper.make_node("Relu", ["x"], ["y"])] * 20_000))
    began = time.process_time()
    with pytest.raises(CheckpointError, match="20,005 nodes; expected 20,000 at most"):
        graphs.check(write(path, many), weights)
    assert time.process_time() - began < 1


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_graphs_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, edits: list[Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    save_file({"w": np.ones((3, 2), np.float32), "codes": np.ones((4, 3), np.int8)}, folder / "model.safetensors")
    header = tensors.header(folder / "model.safetensors")
    content = bytearray(model(header).SerializeToString())
    for place, value in edits:
        content[int(place * len(content))] = value
    try:
        found = graphs.check(write(folder / "graph.onnx", bytes(content)), header)
        proto = onnx.ModelProto.FromString(bytes(content))
    except (CheckpointError, DecodeError):
        return
    # The onnx package, where it can read the same bytes at all, reads the same from them.
    assert [node.op_type for node in proto.graph.node] == [name for _, name in found.operators]
    for theirs, ours in zip(proto.graph.initializer, found.initializers, strict=True):
        assert (theirs.name, tuple(theirs.dims)) == (ours.name, ours.shape)
        assert {each.key: each.value for each in theirs.external_data} == (ours.external or {})

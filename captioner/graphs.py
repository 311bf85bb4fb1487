"""Graphs in the ONNX format that may come from a stranger: read without the onnx package, and checked before they run.

A graph of captioner is made of the operators below, has no graph within it, and takes every weight from the
`model.safetensors` beside it. The reader knows the fields of ONNX that such a graph needs and refuses any other, so
that nothing is overlooked that onnxruntime would act on. The wire format is described at
https://protobuf.dev/programming-guides/encoding/, and the numbers of the fields stand in `onnx.proto`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from captioner.errors import CheckpointError
from captioner.tensors import Entry

#: The operators that `captioner export` writes, by their domain; others are refused.
OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        """Abs Add AveragePool Cast Clip Concat Conv DequantizeLinear Div Flatten Gather GatherElements Gemm Log MatMul
        Max MaxPool Mul QLinearConv QuantizeLinear ReduceL2 Relu Reshape Sigmoid Sign Softmax Split Sqrt Sub Tanh
        TopK Transpose Unsqueeze""".split()
    ),
    "com.microsoft": frozenset("MatMulIntegerToFloat QLinearAdd QLinearAveragePool QLinearConcat".split()),
}

_LARGEST = 16 << 20  # bytes of a graph without its weights
_NODES = 20_000
_INLINE = 4096  # bytes of a tensor within the graph: shapes, axes, single numbers

#: ONNX's numbers of types of tensors -> numpy's names, and bytes an element.
_TYPES = {
    1: ("float32", 4),
    2: ("uint8", 1),
    3: ("int8", 1),
    5: ("int16", 2),
    6: ("int32", 4),
    7: ("int64", 8),
    9: ("bool", 1),
    10: ("float16", 2),
}

Kind = Literal["number", "float", "bytes"]  # a number of variable length, four bytes, a length and so many bytes


class _Field(NamedTuple):
    name: str
    kind: Kind
    many: bool = False


_MODEL = {
    1: _Field("ir_version", "number"),
    2: _Field("producer_name", "bytes"),
    3: _Field("producer_version", "bytes"),
    4: _Field("domain", "bytes"),
    5: _Field("model_version", "number"),
    6: _Field("doc_string", "bytes"),
    7: _Field("graph", "bytes"),
    8: _Field("opset_import", "bytes", many=True),
    14: _Field("metadata_props", "bytes", many=True),
}
_OPSET = {1: _Field("domain", "bytes"), 2: _Field("version", "number")}
_GRAPH = {
    1: _Field("node", "bytes", many=True),
    2: _Field("name", "bytes"),
    5: _Field("initializer", "bytes", many=True),
    10: _Field("doc_string", "bytes"),
    11: _Field("input", "bytes", many=True),
    12: _Field("output", "bytes", many=True),
    13: _Field("value_info", "bytes", many=True),
    16: _Field("metadata_props", "bytes", many=True),
}
_NODE = {
    1: _Field("input", "bytes", many=True),
    2: _Field("output", "bytes", many=True),
    3: _Field("name", "bytes"),
    4: _Field("op_type", "bytes"),
    5: _Field("attribute", "bytes", many=True),
    6: _Field("doc_string", "bytes"),
    7: _Field("domain", "bytes"),
    9: _Field("metadata_props", "bytes", many=True),
}
_ATTRIBUTE = {
    1: _Field("name", "bytes"),
    2: _Field("f", "float"),
    3: _Field("i", "number"),
    4: _Field("s", "bytes"),
    5: _Field("t", "bytes"),
    7: _Field("floats", "float", many=True),
    8: _Field("ints", "number", many=True),
    9: _Field("strings", "bytes", many=True),
    13: _Field("doc_string", "bytes"),
    20: _Field("type", "number"),
}
_TENSOR = {
    1: _Field("dims", "number", many=True),
    2: _Field("data_type", "number"),
    4: _Field("float_data", "float", many=True),
    5: _Field("int32_data", "number", many=True),
    7: _Field("int64_data", "number", many=True),
    8: _Field("name", "bytes"),
    9: _Field("raw_data", "bytes"),
    12: _Field("doc_string", "bytes"),
    13: _Field("external_data", "bytes", many=True),
    14: _Field("data_location", "number"),
}
_PAIR = {1: _Field("key", "bytes"), 2: _Field("value", "bytes")}

#: The wire types of the format. A list of numbers may also come as bytes, one number behind the other.
_WIRE: dict[int, Kind] = {0: "number", 2: "bytes", 5: "float"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    external: Mapping[str, str] | None  # location, offset and length; None: the numbers are in the graph


@dataclass(frozen=True)
class Graph:
    """The parts of a graph that decide whether it may run."""

    operators: tuple[tuple[str, str], ...]  # domain and name of each node
    initializers: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]  # in attributes of nodes


def check(path: Path, weights: Mapping[str, Entry]) -> Graph:
    """Read a graph and refuse it unless it is one that `captioner export` could have written.

    Args:
        path: a file of ONNX.
        weights: the tensors of the file of weights beside it, which must be named `model.safetensors`.

    Raises:
        CheckpointError: the graph is damaged, has an operator that is not exported, or takes numbers from anywhere but
            the tensor of the same name in the file of weights.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes without its weights")
        graph = read(content)
        for domain, name in graph.operators:
            if name not in OPERATORS.get(domain, ()):
                shown = f"{domain}.{name}" if domain else name
                raise ValueError(f"the operator {shown[:80]!r}, which captioner does not export")
        for tensor in graph.constants:
            if tensor.external is not None:
                raise ValueError("a constant whose numbers are in another file")
        names = [tensor.name for tensor in graph.initializers]
        if len(set(names)) < len(names):
            raise ValueError("two weights of one name")
        for tensor in graph.initializers:
            if tensor.external is not None:
                _check_external(tensor, weights)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the model again") from None
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a graph that captioner exports ({error}); export the model again: captioner export"
        ) from None
    return graph


def _check_external(tensor: Tensor, weights: Mapping[str, Entry]) -> None:
    name, given = tensor.name[:80], dict(tensor.external or {})
    if given.get("location") != "model.safetensors":
        raise ValueError(f"{name!r} is in {given.get('location', '')[:80]!r}; expected 'model.safetensors'")
    entry = weights.get(tensor.name)
    if entry is None:
        raise ValueError(f"{name!r} is not in model.safetensors")
    expected = {"location": "model.safetensors", "offset": str(entry.begin), "length": str(entry.length)}
    if given != expected:
        raise ValueError(f"{name!r} is at {given!r:.160}; expected {expected!r}")
    if tensor.dtype != entry.dtype or math.prod(tensor.shape) != math.prod(entry.shape):
        raise ValueError(
            f"{name!r} is {tensor.shape} of {tensor.dtype}, and in model.safetensors {entry.shape} of {entry.dtype}"
        )


def read(content: bytes) -> Graph:
    """Read a model of ONNX.

    Raises:
        ValueError: it is damaged, or has parts that no graph of captioner has.
    """
    model = _message(memoryview(content), _MODEL, "the model")
    operators: list[tuple[str, str]] = []
    constants: list[Tensor] = []
    for opset in model["opset_import"]:
        domain = _text(_message(opset, _OPSET, "an opset")["domain"])
        if domain not in ("ai.onnx", *OPERATORS):
            raise ValueError(f"operators of {domain[:80]!r}")
    if not model["graph"]:
        raise ValueError("no graph")
    graph = _message(model["graph"][0], _GRAPH, "the graph")
    if len(graph["node"]) > _NODES:
        raise ValueError(f"{len(graph['node']):,} nodes; expected {_NODES:,} at most")
    for each in graph["node"]:
        node = _message(each, _NODE, "a node")
        domain = _text(node["domain"])
        operators.append(("" if domain == "ai.onnx" else domain, _text(node["op_type"])))
        for attribute in node["attribute"]:
            constants += [
                _tensor(value) for value in _message(attribute, _ATTRIBUTE, f"a node {operators[-1][1][:40]!r}")["t"]
            ]
    return Graph(tuple(operators), tuple(map(_tensor, graph["initializer"])), tuple(constants))


def _tensor(content: memoryview) -> Tensor:
    """One tensor, whose size and whose numbers are compared where these are in the graph."""
    fields = _message(content, _TENSOR, "a tensor")
    name = _text(fields["name"])
    (kind,) = fields["data_type"] or (0,)
    if kind not in _TYPES:
        raise ValueError(f"the tensor {name[:80]!r} of a type with the number {kind}")
    dtype, size = _TYPES[kind]
    shape = tuple(_numbers(fields["dims"]))
    if len(shape) > 8 or any(each >= 1 << 32 for each in shape):  # negative ones are large numbers here
        raise ValueError(f"the tensor {name[:80]!r} of the shape {shape!r:.80}")
    if fields["data_location"] not in ([], [0]):  # in another file
        pairs = [_message(each, _PAIR, "a place of weights") for each in fields["external_data"]]
        external = {_text(pair["key"]): _text(pair["value"]) for pair in pairs}
        if len(external) < len(pairs) or any(
            fields[key] for key in ("raw_data", "float_data", "int32_data", "int64_data")
        ):
            raise ValueError(f"the tensor {name[:80]!r} in two places")
        return Tensor(name, dtype, shape, external)
    if fields["external_data"]:
        raise ValueError(f"the tensor {name[:80]!r} in two places")
    count = math.prod(shape)
    if count * size > _INLINE:
        raise ValueError(
            f"the tensor {name[:80]!r} of {count * size:,} bytes within the graph; expected {_INLINE:,} at most"
        )
    if fields["raw_data"]:
        given = len(fields["raw_data"][0]) / size
    else:
        given = len(list(_numbers(fields["int32_data"]))) + len(list(_numbers(fields["int64_data"])))
        given += sum(len(each) // 4 for each in fields["float_data"])
    if given != count:
        raise ValueError(f"the tensor {name[:80]!r} of {shape} with {given:g} numbers")
    return Tensor(name, dtype, shape, None)


def _text(values: list[Any]) -> str:
    """A text that is there once or not at all."""
    return bytes(values[0]).decode("utf-8") if values else ""


def _numbers(values: list[Any]) -> Iterator[int]:
    """A list of numbers, each a field of its own or one behind the other."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _message(content: memoryview, fields: Mapping[int, _Field], name: str) -> dict[str, list[Any]]:
    """The fields of a message: numbers as int, everything else as bytes.

    Args:
        content: the encoded message.
        fields: those that it may have.
        name: of the message, for errors.
    """
    found: dict[str, list[Any]] = {field.name: [] for field in fields.values()}
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = _WIRE.get(key & 7)
        field = fields.get(key >> 3)
        packed = field is not None and field.many and field.kind != "bytes" and wire == "bytes"
        if field is None or wire is None or not (wire == field.kind or packed):
            raise ValueError(f"{name} has a field {key >> 3} (of type {key & 7}) that is not expected")
        if found[field.name] and not field.many:
            raise ValueError(f"{name} has {field.name} twice")
        if wire == "number":
            number, at = _varint(content, at)
            found[field.name].append(number)
            continue
        if wire == "float":
            length = 4
        else:
            length, at = _varint(content, at)
        if length > len(content) - at:
            raise ValueError(f"{name} is cut short")
        found[field.name].append(content[at : at + length])
        at += length
    return found


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & ((1 << 64) - 1), at
    raise ValueError("a number that does not end")

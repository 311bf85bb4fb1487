"""ONNX graphs while they are built, and the one file that holds the weights of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from captioner.graphs import OPERATORS

#: Version of ONNX's operators, and of the file format. onnxruntime 1.18 and later read both.
_OPSET, _IR_VERSION = 17, 9
#: Operators of onnxruntime that ONNX itself lacks: they multiply 8-bit matrices and add 8-bit maps.
CONTRIB = "com.microsoft"
#: Largest constant that lies in a graph itself, in bytes; larger ones lie in the file of weights.
_INLINE = 256

_TYPES: dict[type, int] = {np.float32: TensorProto.FLOAT, np.int64: TensorProto.INT64, np.uint8: TensorProto.UINT8}

Array = npt.NDArray[Any]


class Weights:
    """Tensors by name, which graphs refer to and training can read back."""

    FILE = "model.safetensors"

    def __init__(self) -> None:
        self.tensors: dict[str, Array] = {}

    def add(self, name: str, tensor: Array) -> str:
        """Hold a tensor; the same name may be added again only with the same numbers."""
        tensor = np.asarray(tensor, order="C")
        known = self.tensors.setdefault(name, tensor)
        assert known is tensor or np.array_equal(known, tensor), name
        return name

    def serialise(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The bytes of the file, and where in it each tensor lies: offset and length in bytes."""
        data = save(self.tensors)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return data, {name: (8 + size + begin, end - begin) for name, (begin, end) in places.items()}


class Graph:
    """One graph: nodes in the order in which they compute."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.name, self.weights = name, weights
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._stored: list[str] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._renamed: dict[str, str] = {}  # values that are outputs

    def input(self, name: str, kind: type, shape: Sequence[int | str]) -> str:
        """Declare an input; texts in the shape are sizes that are known when the graph runs."""
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[kind], shape))
        return name

    def output(self, value: str, name: str, kind: type, shape: Sequence[int | str]) -> None:
        """Declare a value as an output, under a name, which takes the place of its own."""
        self._renamed[value] = name
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[kind], shape))

    def constant(self, value: Array | np.generic) -> str:
        """A small constant that only this graph has."""
        value = np.asarray(value)
        assert value.nbytes <= _INLINE, value.shape
        name = f"constant_{value.dtype}_{value.shape}_{value.tobytes().hex()}"
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def weight(self, name: str, tensor: Array) -> str:
        """A tensor of the file of weights."""
        self.weights.add(name, tensor)
        if name not in self._stored:
            self._stored.append(name)
        return name

    def node(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node.

        Args:
            operator: its name in ONNX.
            inputs: names of values; an empty one leaves out an optional input.
            domain: of the operator, see `CONTRIB`.
            outputs: how many it has.
            attributes: of the operator.

        Returns:
            The name of its output, or a list of them.
        """
        assert operator in OPERATORS[domain], f"{operator} is to be added to captioner.graphs.OPERATORS"
        names = [f"{operator}_{len(self._nodes)}_{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def build(self, places: dict[str, tuple[int, int]]) -> bytes:
        """The file of the graph.

        Args:
            places: where in the file of weights each tensor lies, see `Weights.serialise`.
        """
        stored = []
        for name in self._stored:
            tensor = self.weights.tensors[name]
            proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(tensor.dtype), dims=tensor.shape)
            offset, length = places[name]
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (("location", Weights.FILE), ("offset", offset), ("length", length)):
                proto.external_data.add(key=key, value=str(value))
            stored.append(proto)
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(each, each) for each in names]
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, [*self._constants.values(), *stored]
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="captioner")
        model.ir_version = _IR_VERSION
        return bytes(model.SerializeToString())

"""The CNN as a graph: photos -> 4096 numbers.

The network is walked as torch traced it (`Encoder.body`). Batch normalisation becomes part of the convolution before it
(Jacob et al. 2018, section 3.2), and in 8 bits so does the ReLU behind it: the scale of the output begins at 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, fx, nn

from captioner.config import FEATURE_SIZE
from captioner.errors import CaptionerError
from captioner.export.eight_bits import Scale, codes
from captioner.export.graph import CONTRIB, Graph, Weights
from captioner.networks.encoder import Encoder

_PREFIX = "encoder."
_GRID = "grid"  # name of the averaging onto the grid, where it is a layer of the network, see `_averaged_early`
_ADD, _CAT, _FLATTEN, _RELU = {"add", "iadd", "add_"}, {"cat", "concat"}, {"flatten"}, {"relu", "relu_", "relu6"}
#: Share of the calibration photos whose numbers may lie beyond a scale, at either end.
_STRANGE = 0.05
_NOTHING = (nn.Dropout, nn.Identity)  # layers that do nothing once a network is trained

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Value:
    """A value of the graph."""

    name: str
    scale: Scale | None  # of a value in 8 bits; None: the value is in fp32


class EncoderExport:
    """Builds the graph of one encoder."""

    def __init__(self, encoder: Encoder, weights: Weights, photos: Tensor | None) -> None:
        """Measure the range of each layer's output.

        Args:
            encoder: in evaluation mode.
            weights: takes the encoder's tensors.
            photos: calibration photos, uint8 `(photos, 3, height, width)`; None builds a graph in fp32.
        """
        self.encoder, self.weights, self.exact = encoder, weights, photos is None
        self.body = _averaged_early(encoder)
        self.modules = dict(self.body.named_modules())
        size = encoder.config.image_size
        probe = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.ranges = _ranges(encoder, self.body, probe if photos is None else photos)
        self.values: dict[fx.Node, _Value] = {}
        self.pads: dict[fx.Node, tuple[int, int, int, int]] = {}  # zeros that the convolution behind adds itself

    def graph(self) -> Graph:
        """The graph: uint8 photos in, float32 features out."""
        graph = Graph("encoder_model", self.weights)
        size = self.encoder.config.image_size
        photos = graph.input("photos", np.uint8, ["photos", 3, size, size])
        nodes = list(self.body.graph.nodes)
        first = next(number for number, node in enumerate(nodes) if node.op == "call_module")
        entry = nodes[first].args[0]
        assert isinstance(entry, fx.Node)
        self.values[entry] = self._entry(graph, photos, entry)
        for node in nodes[first:]:
            if node.op == "output":
                features = self._grid(graph, _tapped(self.body))
                graph.output(features, "features", np.float32, ["photos", FEATURE_SIZE])
            elif node not in self.values:
                self._node(graph, node)
        return graph

    def _node(self, graph: Graph, node: fx.Node) -> None:
        """Add one layer. The layers that become part of it, such as its ReLU, get the same value."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", str(node.target))
        sources = [arg for arg in _flat(node.args) if isinstance(arg, fx.Node)]
        if isinstance(module, nn.Conv2d | nn.Linear):
            self._product(graph, node, module, sources[0])
        elif isinstance(module, nn.ZeroPad2d):
            left, right, top, bottom = module.padding
            self.pads[node] = (top, left, bottom, right)
            self.values[node] = self.values[sources[0]]
        elif name in _ADD and len(sources) == 2:
            end = self._activated(node)
            one, other = (self.values[each] for each in sources)
            self._finish(node, end, self._add(graph, one, other, end))
        elif name in _CAT:
            self.values[node] = self._cat(graph, [self.values[each] for each in sources], node)
        elif isinstance(module, nn.ReLU | nn.ReLU6) or name in _RELU:
            self.values[node] = self._float(graph, self._relu(graph, self._real(graph, sources[0]), node), node)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            self.values[node] = self._pool(graph, module, sources[0])
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            rows, columns = self.ranges[node].shape[2:]
            self.values[node] = _Value(self._averaged(graph, sources[0], rows, columns), None)
        elif name in _FLATTEN or isinstance(module, nn.Flatten):
            self.values[node] = _Value(graph.node("Flatten", self._real(graph, sources[0]), axis=1), None)
        elif isinstance(module, _NOTHING):
            self.values[node] = self.values[sources[0]]
        else:
            what = type(module).__name__ if module is not None else name
            raise CaptionerError(
                f"{self.encoder.config.name} has a layer that cannot be exported ({what}); caption with --engine torch"
            )

    # Layers ---------------------------------------------------------------------------------------------------------

    def _entry(self, graph: Graph, photos: str, entry: fx.Node) -> _Value:
        """Photos as the first layer wants them: a factor and an offset a channel."""
        size = self.encoder.config.image_size
        levels = torch.tensor([0, 255, 51], dtype=torch.uint8)
        photos_of_one_level = levels.view(-1, 1, 1, 1).expand(-1, 3, size, size)
        dark, bright, between = _Recorder(self.body, keep=entry).at(self.encoder, photos_of_one_level)
        factor, offset = ((bright - dark) / 255).numpy(), dark.numpy()
        assert np.allclose(between.numpy(), factor * 51 + offset, atol=1e-4), "not one factor a channel"
        x = graph.node("Cast", photos, to=onnx.TensorProto.FLOAT)
        x = graph.node("Mul", x, graph.constant(factor.astype(np.float32).reshape(3, 1, 1)))
        x = graph.node("Add", x, graph.constant(offset.astype(np.float32).reshape(3, 1, 1)))
        if self.exact:
            return _Value(x, None)
        reached = np.concatenate([offset, 255 * factor + offset])
        return self._stored(graph, x, Scale.over(float(reached.min()), float(reached.max())))

    def _product(self, graph: Graph, node: fx.Node, module: nn.Conv2d | nn.Linear, source: fx.Node) -> None:
        """A convolution or a linear layer, with the normalisation and the ReLU behind it."""
        name = _PREFIX + str(node.target)
        weight = module.weight.detach().cpu().float().numpy()
        bias = np.zeros(len(weight), np.float32) if module.bias is None else module.bias.detach().cpu().numpy()
        factor = np.ones(len(weight), np.float32)
        norm_node = _only_user(node)
        norm = self.modules.get(str(norm_node.target)) if norm_node and norm_node.op == "call_module" else None
        end = node
        if isinstance(norm, nn.BatchNorm2d):
            assert norm_node is not None
            factor, bias, end = *_folded(norm, bias), norm_node
            self.values[norm_node] = _Value("", None)
            if not self.exact:  # training reads these back
                for key, tensor in norm.state_dict().items():
                    if tensor.is_floating_point():
                        self.weights.add(f"{_PREFIX}{norm_node.target}.{key}", tensor.detach().cpu().numpy())
        last = self._activated(end)
        rows = (weight.reshape(len(weight), -1) * factor[:, None]).reshape(weight.shape)
        if self.exact:
            folded = graph.weight(f"graph.{name}.weight", rows), graph.weight(f"graph.{name}.bias", bias)
            real = self._real(graph, source)
            if isinstance(module, nn.Linear):
                y = graph.node("Gemm", real, *folded, transB=1)
            else:
                y = graph.node("Conv", real, *folded, **self._how(module, source))
            self._finish(node, last, _Value(self._relu(graph, y, last) if last is not end else y, None))
            return
        stored, step = codes(rows)
        bias = bias - _shift(rows, stored, step, self.ranges[source].mean, getattr(module, "groups", 1))
        weight_name = graph.weight(f"{name}.weight", stored)
        # Training wants the weights before the normalisation became part of them; its factor may be negative.
        self.weights.add(f"{name}.weight.step", step / np.where(factor == 0, 1, factor))
        if module.bias is not None:
            self.weights.add(f"{name}.bias", module.bias.detach().cpu().numpy())
        steps = graph.weight(f"graph.{name}.weight.step", step)
        x = self._stored(graph, self.values[source], self.ranges[source].scale)
        assert x.scale is not None
        unit, zero = self._parameters(graph, x.scale)
        none = graph.constant(np.int8(0))
        of_grid = source.target == _GRID  # a convolution of 1 x 1: one product a cell, whose results stay in fp32
        if isinstance(module, nn.Linear) or of_grid:
            y, matrix = x.name, weight_name
            if of_grid:
                cells = graph.constant(np.array([0, weight.shape[1], -1], np.int64))
                y = graph.node("Transpose", graph.node("Reshape", y, cells), perm=[0, 2, 1])
                matrix = graph.node("Reshape", matrix, graph.constant(np.array([0, -1], np.int64)))
            matrix = graph.node("Transpose", matrix, perm=[1, 0])
            label = graph.weight(f"graph.{name}.bias", bias)
            y = graph.node("MatMulIntegerToFloat", y, matrix, unit, steps, zero, none, label, domain=CONTRIB)
            if of_grid:
                y = graph.node("Transpose", y, perm=[0, 2, 1])
            self._finish(node, last, _Value(self._relu(graph, y, last) if last is not end else y, None))
            return
        scale = self.ranges[last].scale
        whole = np.rint(bias.astype(np.float64) / (x.scale.step * step.astype(np.float64)))
        whole = whole.clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
        label = graph.weight(f"graph.{name}.bias", whole)
        inputs = (x.name, unit, zero, weight_name, steps, none, *self._parameters(graph, scale), label)
        y = graph.node("QLinearConv", *inputs, **self._how(module, source))
        self._finish(node, last, _Value(y, scale))

    def _how(self, module: nn.Conv2d, source: fx.Node) -> dict[str, Any]:
        """Attributes of a convolution."""
        down, across = (int(each) for each in module.padding)
        pads = [a + b for a, b in zip((down, across, down, across), self.pads.get(source, (0, 0, 0, 0)), strict=True)]
        return {
            "kernel_shape": list(module.kernel_size),
            "strides": list(module.stride),
            "dilations": list(module.dilation),
            "pads": pads,
            "group": module.groups,
        }

    def _add(self, graph: Graph, one: _Value, other: _Value, end: fx.Node) -> _Value:
        if one.scale is None or other.scale is None:
            total = graph.node("Add", one.name, other.name)
            return _Value(self._relu(graph, total, end), None)
        scale = self.ranges[end].scale
        inputs = [part for each in (one, other) for part in self._triple(graph, each)]
        y = graph.node("QLinearAdd", *inputs, *self._parameters(graph, scale), domain=CONTRIB)
        return _Value(y, scale)

    def _cat(self, graph: Graph, parts: Sequence[_Value], node: fx.Node) -> _Value:
        if any(part.scale is None for part in parts):
            return _Value(graph.node("Concat", *(part.name for part in parts), axis=1), None)
        scale = self.ranges[node].scale
        inputs = [each for part in parts for each in self._triple(graph, part)]
        y = graph.node("QLinearConcat", *self._parameters(graph, scale), *inputs, domain=CONTRIB, axis=1)
        return _Value(y, scale)

    def _pool(self, graph: Graph, module: nn.MaxPool2d | nn.AvgPool2d, source: fx.Node) -> _Value:
        value = self.values[source]
        sides = _pair(module.padding)
        how: dict[str, Any] = {
            "kernel_shape": _pair(module.kernel_size),
            "strides": _pair(module.stride),
            "pads": [*sides, *sides],
            "ceil_mode": int(module.ceil_mode),
        }
        if isinstance(module, nn.MaxPool2d):
            return _Value(graph.node("MaxPool", value.name, **how), value.scale)
        how["count_include_pad"] = int(module.count_include_pad and any(sides))
        if value.scale is None:
            return _Value(graph.node("AveragePool", value.name, **how), None)
        parameters = self._parameters(graph, value.scale)
        y = graph.node("QLinearAveragePool", value.name, *parameters, *parameters, domain=CONTRIB, **how)
        return _Value(y, value.scale)

    def _grid(self, graph: Graph, tap: fx.Node) -> str:
        """The output of the tapped layer, averaged onto the grid and flattened as `Encoder.flatten` does."""
        pool = self.encoder.pool
        if isinstance(pool, nn.Identity):
            return str(graph.node("Flatten", self._real(graph, tap), axis=1))
        rows, columns = _pair(pool.output_size)
        return str(graph.node("Flatten", self._averaged(graph, tap, rows, columns), axis=1))

    def _averaged(self, graph: Graph, source: fx.Node, rows: int, columns: int) -> str:
        """A map averaged onto a grid, as `nn.AdaptiveAvgPool2d` does: one product with a matrix of shares."""
        x = self._real(graph, source)
        channels, height, width = self.ranges[source].shape[1:]
        if (height, width) == (rows, columns):
            return x
        cells = torch.eye(height * width).view(height * width, 1, height, width)
        shares = nn.functional.adaptive_avg_pool2d(cells, (rows, columns)).flatten(1).numpy()
        flat = graph.node("Reshape", x, graph.constant(np.array([0, channels, height * width], np.int64)))
        y = graph.node("MatMul", flat, graph.weight(f"graph.grid.{height}x{width}.{rows}x{columns}", shares))
        return str(graph.node("Reshape", y, graph.constant(np.array([0, channels, rows, columns], np.int64))))

    # Fp32 and 8 bits ------------------------------------------------------------------------------------------------

    def _activated(self, node: fx.Node) -> fx.Node:
        """The ReLU behind a layer, where nothing else reads the layer; or the layer itself."""
        user = _only_user(node)
        module = self.modules.get(str(user.target)) if user and user.op == "call_module" else None
        function = user is not None and getattr(user.target, "__name__", "") in _RELU
        return user if user is not None and (isinstance(module, nn.ReLU | nn.ReLU6) or function) else node

    def _finish(self, node: fx.Node, end: fx.Node, value: _Value) -> None:
        self.values[node] = self.values[end] = value

    def _relu(self, graph: Graph, x: str, node: fx.Node) -> str:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", "")
        if isinstance(module, nn.ReLU6) or name == "relu6":
            return str(graph.node("Clip", x, graph.constant(np.float32(0)), graph.constant(np.float32(6))))
        return str(graph.node("Relu", x)) if isinstance(module, nn.ReLU) or name in _RELU else x

    def _stored(self, graph: Graph, value: _Value | str, scale: Scale) -> _Value:
        """A value in 8 bits."""
        if isinstance(value, _Value) and value.scale is not None:
            return value
        name = value if isinstance(value, str) else value.name
        return _Value(graph.node("QuantizeLinear", name, *self._parameters(graph, scale)), scale)

    def _real(self, graph: Graph, source: fx.Node) -> str:
        """A value in fp32."""
        value = self.values[source]
        if value.scale is None:
            return value.name
        return str(graph.node("DequantizeLinear", value.name, *self._parameters(graph, value.scale)))

    def _float(self, graph: Graph, name: str, node: fx.Node) -> _Value:
        """A value in fp32, stored in 8 bits where the graph is in 8 bits."""
        value = _Value(name, None)
        return value if self.exact else self._stored(graph, value, self.ranges[node].scale)

    def _triple(self, graph: Graph, value: _Value) -> tuple[str, str, str]:
        assert value.scale is not None
        return (value.name, *self._parameters(graph, value.scale))

    def _parameters(self, graph: Graph, scale: Scale) -> tuple[str, str]:
        return graph.constant(np.float32(scale.step)), graph.constant(np.uint8(scale.zero))


def _flat(args: Any) -> list[Any]:
    return [each for arg in args for each in (_flat(arg) if isinstance(arg, list | tuple) else [arg])]


def _pair(value: Any) -> list[int]:
    return [int(each) for each in value] if isinstance(value, tuple | list) else [int(value)] * 2


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _folded(norm: nn.BatchNorm2d, bias: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The factor by which a normalisation scales the rows of a convolution before it, and the bias of both."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance, gamma, beta = (
        each.detach().cpu().double().numpy() for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    factor = gamma / np.sqrt(variance + norm.eps)
    return factor.astype(np.float32), (beta + (bias - mean) * factor).astype(np.float32)


def _shift(
    rows: FloatArray, stored: npt.NDArray[np.int8], step: FloatArray, mean: FloatArray, groups: int
) -> FloatArray:
    """How much rounded weights change the mean of each output, `(outputs,)`: the bias makes up for it.

    Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2.
    """
    change = stored.reshape(len(stored), -1) * step[:, None] - rows.reshape(len(rows), -1)
    # (outputs, inputs of a group): summed over the places of the kernel
    change = change.reshape(len(rows), rows.shape[1], -1).sum(axis=2)
    seen = np.repeat(mean.reshape(groups, -1), len(rows) // groups, axis=0)
    shift: FloatArray = (change * seen).sum(axis=1)
    return shift


def _averaged_early(encoder: Encoder) -> fx.GraphModule:
    """The network; a tapped convolution of 1 x 1 is moved behind the averaging onto the grid.

    Both are linear, so the features stay the same, and the convolution is computed once a cell of the grid instead of
    once a place of the map.
    """
    body: fx.GraphModule = encoder.body
    module = body.get_submodule(str(_tapped(body).target)) if _tapped(body).op == "call_module" else None
    if not isinstance(module, nn.Conv2d) or isinstance(encoder.pool, nn.Identity):
        return body
    if {*module.kernel_size, *module.stride, module.groups} != {1} or module.padding != (0, 0):
        return body
    body = fx.GraphModule(body, copy.deepcopy(body.graph))  # with the same layers
    body.add_submodule(_GRID, encoder.pool)
    tap = _tapped(body)
    with body.graph.inserting_before(tap):
        tap.args = (body.graph.call_module(_GRID, tap.args),)
    body.recompile()
    return body


def _tapped(body: fx.GraphModule) -> fx.Node:
    """The layer whose output is averaged onto the grid."""
    (output,) = body.graph.find_nodes(op="output")
    (tap,) = output.args[0].values()
    assert isinstance(tap, fx.Node)
    return tap


@dataclass
class _Range:
    """The numbers that a layer yields."""

    shape: tuple[int, ...] = ()
    lows: list[Tensor] = field(default_factory=list)  # smallest number of each photo
    highs: list[Tensor] = field(default_factory=list)  # largest
    means: list[Tensor] = field(default_factory=list)  # means a channel

    @property
    def mean(self) -> FloatArray:
        """Means a channel over all photos, `(channels,)`."""
        mean: FloatArray = torch.cat(self.means).mean(dim=0).numpy()
        return mean

    @property
    def scale(self) -> Scale:
        """Reaches over the numbers of all photos but the strangest few: one photo can yield a hundred times more."""
        low = torch.cat(self.lows).quantile(_STRANGE)
        return Scale.over(float(low), float(torch.cat(self.highs).quantile(1 - _STRANGE)))


class _Recorder(fx.Interpreter):
    """Runs a network and notes the range of every layer, or the output of one of them."""

    def __init__(self, body: fx.GraphModule, keep: fx.Node | None = None) -> None:
        super().__init__(body)
        self.ranges: dict[fx.Node, _Range] = {}
        self.keep, self.kept = keep, torch.empty(0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            found = self.ranges.setdefault(n, _Range())
            found.shape = tuple(result.shape)
            found.lows.append(result.flatten(1).amin(dim=1).float().cpu())
            found.highs.append(result.flatten(1).amax(dim=1).float().cpu())
            found.means.append(result.flatten(2).mean(dim=2).cpu() if result.ndim > 2 else result.cpu())
            if n is self.keep:
                self.kept = found.means[-1].clone()
        return result

    @torch.inference_mode()
    def at(self, encoder: Encoder, photos: Tensor) -> Tensor:
        """Means a channel of the kept layer's output, `(photos, channels)`."""
        self.run(encoder.standardise(photos.to(encoder.mean.device)).contiguous())
        return self.kept.cpu()


@torch.inference_mode()
def _ranges(encoder: Encoder, body: fx.GraphModule, photos: Tensor) -> dict[fx.Node, _Range]:
    recorder = _Recorder(body)
    for some in torch.split(photos, 32):
        recorder.run(encoder.standardise(some.to(encoder.mean.device)))
    return recorder.ranges

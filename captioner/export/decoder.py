"""The recurrent decoder as two graphs: the first hidden state, and one word.

`decoder_start_model` turns features into the first hidden state. `decoder_model` reads one word a row and answers with
the likeliest next words and their log-probabilities: only a few numbers a row leave the graph. States are one array a
layer and part, `h_0`, `c_0`, `h_1` and so on, `(rows, hidden)`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from captioner.config import FEATURE_SIZE
from captioner.export.eight_bits import MOST, Scale, codes
from captioner.export.graph import CONTRIB, Graph, Weights
from captioner.networks.decoder import Decoder

_PREFIX = "decoder."
#: Standardised features beyond this share of all are cut: a few of them would make the steps of all others coarse.
_CUT = 1e-4
#: A hidden state lies between -1 and 1 in a network with tanh.
_TANH = Scale(1 / 127, 128)
#: Numbers in the longest vectors of processors, in fp32.
_VECTOR = 16

FloatArray = npt.NDArray[np.float32]


class DecoderExport:
    """Builds both graphs of one decoder."""

    def __init__(self, decoder: Decoder, weights: Weights, features: Tensor | None) -> None:
        """Measure the ranges of what the layers read.

        Args:
            decoder: a trained decoder.
            weights: takes the decoder's tensors.
            features: of calibration photos, `(photos, 4096)`; None builds graphs in fp32.
        """
        self.decoder, self.weights = decoder, weights
        self.state = {name: tensor.detach().cpu().float().numpy() for name, tensor in decoder.state_dict().items()}
        self.exact = features is None
        self.ranges = {} if features is None else _ranges(decoder, features)
        for name, tensor in self.state.items():
            if tensor.ndim < 2:  # training reads these back too; matrices follow with their products
                weights.add(_PREFIX + name, tensor)

    @property
    def parts(self) -> list[str]:
        """Names of the arrays of a hidden state."""
        kinds = "hc" if self.decoder.config.cell == "lstm" else "h"
        return [f"{kind}_{layer}" for kind in kinds for layer in range(self.decoder.config.layers)]

    def start(self) -> Graph:
        """`features` -> the first hidden state."""
        graph = Graph("decoder_start_model", self.weights)
        config = self.decoder.config
        x = self._normalised(graph, graph.input("features", np.float32, ("photos", FEATURE_SIZE)))
        numbers = self._product(graph, x, "initial.weight", self.state["initial.bias"], self.ranges.get("initial"))
        pieces = graph.node("Split", numbers, outputs=len(self.parts), axis=1)
        for name, piece in zip(self.parts, [pieces] if len(self.parts) == 1 else pieces, strict=True):
            if name.startswith("h"):
                piece = graph.node("Relu" if config.cell == "irnn" else "Tanh", piece)
            graph.output(piece, name, np.float32, ["photos", config.hidden_size])
        return graph

    def step(self) -> Graph:
        """One word read: its inputs and outputs are described at the top of this file."""
        graph = Graph("decoder_model", self.weights)
        config, size = self.decoder.config, self.decoder.vocabulary_size
        tokens = graph.input("tokens", np.int64, ["rows"])
        parents = graph.input("parents", np.int64, ["rows"])
        shape: tuple[int | str, ...] = ("parents_of_rows", config.hidden_size)
        before = {name: graph.node("Gather", graph.input(name, np.float32, shape), parents) for name in self.parts}
        count = graph.input("count", np.int64, [1])
        named = graph.input("named", np.int64, ["named"])

        x = ""
        for layer in range(config.layers):
            from_input = self._word(graph, tokens) if layer == 0 else self._input(graph, layer, x)
            h, *c = self._cell(graph, layer, from_input, before)
            graph.output(h, f"next_h_{layer}", np.float32, ["rows", config.hidden_size])
            for each in c:
                graph.output(each, f"next_c_{layer}", np.float32, ["rows", config.hidden_size])
            x = h
        logits = self._product(graph, x, "output.weight", self.state["output.bias"], self._hidden(config.layers - 1))

        top, word = graph.node("TopK", logits, count, outputs=2, axis=1)
        # A log-probability is the logit minus the log of the sum of all exponentials. onnxruntime vectorises a softmax
        # and not that sum, so the log of the sum is computed as the likeliest word's logit minus the log of its
        # probability.
        likely = graph.node("Softmax", logits, axis=1)
        best = graph.constant(np.array([0], np.int64))
        first, logit = graph.node("Gather", word, best, axis=1), graph.node("Gather", top, best, axis=1)
        probability = graph.node("GatherElements", likely, first, axis=1)
        # onnxruntime computes logs in vectors of up to 16 numbers, and those that are left over by another function,
        # which rounds differently. As each row has 16 copies, none is left over: a row's log depends on that row alone.
        copies = graph.node("Mul", probability, graph.constant(np.ones((1, _VECTOR), np.float32)))
        total = graph.node("Sub", logit, graph.node("Gather", graph.node("Log", copies), best, axis=1))
        graph.output(graph.node("Sub", top, total), "logprob", np.float32, ["rows", "count"])
        graph.output(word, "word", np.int64, ["rows", "count"])
        asked = graph.node("Sub", graph.node("Gather", logits, named, axis=1), total)
        graph.output(asked, "named_logprob", np.float32, ["rows", "named"])
        graph.output(logits, "logits", np.float32, ["rows", size])  # not copied unless they are asked for
        return graph

    # Parts of the network -------------------------------------------------------------------------------------------

    def _normalised(self, graph: Graph, x: str) -> str:
        """Features scaled as `Decoder.normalise` scales them."""
        norm = self.decoder.config.feature_norm
        if norm == "none":
            return x
        least = graph.constant(np.float32(1e-12))
        root = graph.node("Sqrt", graph.node("Max", graph.node("Abs", x), least))
        x = graph.node("Mul", graph.node("Sign", x), root)
        length = graph.node("Max", graph.node("ReduceL2", x, axes=[1], keepdims=1), least)
        x = graph.node("Mul", graph.node("Div", x, length), graph.constant(np.float32(FEATURE_SIZE**0.5)))
        if norm == "sqrt":
            return x
        mean, variance = self.state["standard.mean"], self.state["standard.variance"]
        factor = (1 / np.sqrt(variance.astype(np.float64) + 1e-5)).astype(np.float32)
        x = graph.node("Sub", x, graph.weight(_PREFIX + "standard.mean", mean))
        return str(graph.node("Mul", x, graph.weight("graph.standard.factor", factor)))

    def _word(self, graph: Graph, tokens: str) -> str:
        """The contribution of the word that is read to the gates of the first layer; in 8 bits, one scale a word."""
        weight = self.state["embedding.weight"]
        if self.exact:
            word = graph.node("Gather", graph.weight(_PREFIX + "embedding.weight", weight), tokens)
            return self._input(graph, 0, word)
        stored, step = codes(weight)
        word = graph.node("Gather", graph.weight(_PREFIX + "embedding.weight", stored), tokens)
        scale = graph.node("Gather", graph.weight(_PREFIX + "embedding.weight.step", step), tokens)
        one = Scale(1.0, MOST + 1)
        product = self._matmul(graph, graph.node("Cast", word, to=onnx.TensorProto.FLOAT), one, "rnn.weight_ih_l0")
        scale = graph.node("Unsqueeze", scale, graph.constant(np.array([1], np.int64)))
        bias = graph.weight(_PREFIX + "rnn.bias_ih_l0", self.state["rnn.bias_ih_l0"])
        return str(graph.node("Add", graph.node("Mul", product, scale), bias))

    def _input(self, graph: Graph, layer: int, x: str) -> str:
        bias = self.state[f"rnn.bias_ih_l{layer}"]
        return self._product(graph, x, f"rnn.weight_ih_l{layer}", bias, self._hidden(layer - 1))

    def _hidden(self, layer: int) -> Scale:
        """The range of a layer's hidden state."""
        return self.ranges.get(f"h_{layer}", _TANH)

    def _cell(self, graph: Graph, layer: int, from_input: str, before: dict[str, str]) -> tuple[str, ...]:
        """One step of one layer; gates are in torch's order."""
        cell = self.decoder.config.cell
        h = before[f"h_{layer}"]
        bias = self.state[f"rnn.bias_hh_l{layer}"]
        from_hidden = self._product(graph, h, f"rnn.weight_hh_l{layer}", bias, self._hidden(layer))
        if cell == "gru":
            input_r, input_z, input_n = graph.node("Split", from_input, outputs=3, axis=1)
            hidden_r, hidden_z, hidden_n = graph.node("Split", from_hidden, outputs=3, axis=1)
            r = graph.node("Sigmoid", graph.node("Add", input_r, hidden_r))
            z = graph.node("Sigmoid", graph.node("Add", input_z, hidden_z))
            n = graph.node("Tanh", graph.node("Add", input_n, graph.node("Mul", r, hidden_n)))
            rest = graph.node("Sub", graph.constant(np.float32(1)), z)
            return (str(graph.node("Add", graph.node("Mul", rest, n), graph.node("Mul", z, h))),)
        gates = graph.node("Add", from_input, from_hidden)
        if cell == "lstm":
            i, f, g, o = graph.node("Split", gates, outputs=4, axis=1)
            i, f, o = (graph.node("Sigmoid", gate) for gate in (i, f, o))
            kept = graph.node("Mul", f, before[f"c_{layer}"])
            c = graph.node("Add", kept, graph.node("Mul", i, graph.node("Tanh", g)))
            return str(graph.node("Mul", o, graph.node("Tanh", c))), str(c)
        return (str(graph.node("Relu" if cell == "irnn" else "Tanh", gates)),)

    # Products -------------------------------------------------------------------------------------------------------

    def _product(self, graph: Graph, x: str, name: str, bias: FloatArray, scale: Scale | None) -> str:
        """`x W^T + bias`, in fp32 or from 8-bit numbers."""
        label = f"{_PREFIX}{name.replace('weight', 'bias')}"
        if self.exact:
            weight = graph.weight(_PREFIX + name, self.state[name])
            return str(graph.node("Gemm", x, weight, graph.weight(label, bias), transB=1))
        assert scale is not None
        return self._matmul(graph, x, scale, name, graph.weight(label, bias))

    def _matmul(self, graph: Graph, x: str, scale: Scale, name: str, bias: str = "") -> str:
        """`x` in 8 bits times a matrix in 8 bits, as real numbers."""
        stored, rows = codes(self.state[name])
        weight = graph.node("Transpose", graph.weight(_PREFIX + name, stored), perm=[1, 0])
        steps = graph.weight(f"{_PREFIX}{name}.step", rows)
        step, zero = graph.constant(np.float32(scale.step)), graph.constant(np.uint8(scale.zero))
        x = graph.node("QuantizeLinear", x, step, zero)
        none = graph.constant(np.int8(0))
        inputs = (x, weight, step, steps, zero, none, *([bias] if bias else []))
        return str(graph.node("MatMulIntegerToFloat", *inputs, domain=CONTRIB))


@torch.no_grad()
def _ranges(decoder: Decoder, features: Tensor) -> dict[str, Scale]:
    """Ranges of the standardised features, and of hidden states that have no bound."""
    x = decoder.normalise(features.float())
    low, high = (float(np.quantile(x.cpu().numpy(), share)) for share in (_CUT, 1 - _CUT))
    found = {"initial": Scale.over(low, high)}
    if decoder.config.cell != "irnn":
        return found
    # Units that are not bounded: greedy captions of the calibration photos show how far they reach.
    state = decoder.arrange(decoder.initial(x))
    tokens = torch.zeros(len(x), dtype=torch.long, device=x.device)
    most = state[0].amax(dim=(1, 2))
    for _ in range(20):
        logits, state = decoder.step(tokens, state)
        tokens = logits.argmax(dim=1)
        most = torch.maximum(most, state[0].amax(dim=(1, 2)))
    return found | {f"h_{layer}": Scale.over(0.0, float(value)) for layer, value in enumerate(most)}

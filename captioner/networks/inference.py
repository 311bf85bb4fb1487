"""A decoder made ready to write: the same network as `Decoder`, arranged for `step` alone.

Four things make it several times faster than `Decoder.step`, and none changes what is computed:

- what the first layer makes of a word depends on the word alone, so it is computed once for the whole vocabulary and
  looked up after that: one matrix product less a step;
- what a layer makes of a hidden state is computed once for all the words that follow the same words;
- weights are laid out once as the matrix kernels want them (oneDNN's blocked layout on a processor);
- bfloat16 where the device is fast at it. Products are summed in fp32 there, gates and the cell state `c`, which
  carries what was written so far, are fp32, and logits lie where bfloat16 is finest (see `_level`).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captioner.config import FEATURE_SIZE, Precision
from captioner.networks.decoder import Decoder, State

Layer = Callable[[Tensor], Tensor]

_FEW = 8  # rows
_VECTOR = 64  # numbers; torch unrolls its loops over vectors at most so far
_SERIAL = 16384  # numbers; torch divides twice as many among threads


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    mkldnn: Any = torch.backends.mkldnn
    if device.type != "cpu" or not mkldnn.is_available():
        return False
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of number that a precision means on a device; `auto` is bf16 where that is fast."""
    bf16 = has_fast_bf16(device) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


class PreparedDecoder:
    """`start` and `step` of a decoder, for inference; later changes of the decoder's weights are not seen."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, precision: Precision = "auto") -> None:
        """Copy and arrange the weights.

        Args:
            decoder: a trained decoder; dropout is left out, whatever mode it is in.
            precision: of the matrix products; "auto" is bf16 where the decoder's device is fast at it.
        """
        self._decoder = copy(decoder)  # shares everything but the mode, which decides how features are standardised
        self._decoder.training = False
        self.cell = decoder.config.cell
        self.layers = decoder.config.layers
        self.dtype = dtype_for(precision, decoder.output.weight.device)
        weights = [self._weights(layer) for layer in range(self.layers)]
        w_ih, w_hh, b_ih, b_hh = weights[0]
        if self.cell == "gru":  # the reset gate comes between the hidden bias and the sum, so that one stays apart
            table, hidden_bias = torch.addmm(b_ih, decoder.embedding.weight, w_ih.t()), b_hh
        else:
            table, hidden_bias = torch.addmm(b_ih + b_hh, decoder.embedding.weight, w_ih.t()), torch.zeros_like(b_hh)
        #: What the first layer makes of each word, `(vocabulary, gates * hidden)`.
        self.table = table.to(self.dtype)

        def rounded(weight: Tensor, bias: Tensor) -> Layer:
            return linear(weight.to(self.dtype), bias.float())

        self.initial = rounded(decoder.initial.weight, decoder.initial.bias)
        self.hidden = [rounded(w_hh, hidden_bias)] + [rounded(w, b) for _, w, _, b in weights[1:]]
        self.input = [rounded(w, b) for w, _, b, _ in weights[1:]]
        weight, bias = decoder.output.weight, decoder.output.bias.float()
        self.output = rounded(weight, bias)
        if self.dtype == torch.bfloat16:
            self.output = rounded(weight, bias - self._level())

    def start(self, features: Float[Tensor, "batch 4096"]) -> State:
        """The hidden state that a photo sets.

        Args:
            features: what the encoder saw, `(batch, 4096)`.

        Returns:
            h0 in the precision of the products, and c0 in fp32 for an LSTM, `(layers, batch, hidden)` each; and the
            number of each row, `(1, batch, 1)`. Rows of a state may be taken, left out and repeated: those of one
            number are the same. States are not to be joined.
        """
        normalised = self._decoder.normalise(features.float()).to(self.dtype)
        h0, *c0 = self._decoder.arrange(self.initial(normalised).float())
        return (h0.to(self.dtype), *(c.float() for c in c0), _numbers(h0))

    def step(self, tokens: Int[Tensor, " batch"], state: State) -> tuple[Float[Tensor, "batch vocabulary"], State]:
        """Read one word, and say how likely each word is to follow.

        Args:
            tokens: ids of the words read, `(batch,)`.
            state: hidden state, from `start` or from the step before.

        Returns:
            Logits in the precision of the products, `(batch, vocabulary)`, and the next hidden state. In bfloat16 the
            same number is taken from all logits, which changes no probability.
        """
        *parts, numbers = state
        distinct, copies = _distinct(numbers.flatten())
        from_input = self.table.index_select(0, tokens)
        layers: list[tuple[Tensor, ...]] = []
        for layer in range(self.layers):
            if layer > 0:
                from_input = self.input[layer - 1](layers[-1][0])
            previous = tuple(part[layer] for part in parts)
            from_hidden = _rows(self.hidden[layer](_rows(previous[0], distinct)), copies)
            layers.append(self._cell(from_input.float(), from_hidden.float(), previous))
        joined = zip(*layers, strict=True)
        following = tuple(parts[0][None] if self.layers == 1 else torch.stack(parts) for parts in joined)
        return self.output(layers[-1][0]), (*following, _numbers(following[0]))

    def _cell(self, from_input: Tensor, from_hidden: Tensor, previous: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of one layer, in fp32."""
        if self.cell == "gru":
            hidden = from_hidden.shape[1] // 3
            r, z = _sigmoid(from_input[:, : 2 * hidden] + from_hidden[:, : 2 * hidden]).chunk(2, dim=1)
            n = _tanh(torch.addcmul(from_input[:, 2 * hidden :], r, from_hidden[:, 2 * hidden :]))
            return (torch.lerp(n, previous[0].float(), z).to(self.dtype),)
        gates = from_hidden.add_(from_input)
        if self.cell == "lstm":
            i, f, g, o = _sigmoid(gates).chunk(4, dim=1)
            c = torch.addcmul(f * previous[1], i, g.mul_(2).sub_(1))  # g is twice what it was, see `_weights`
            return _tanh(c).mul_(o).to(self.dtype), c
        return ((gates.relu_() if self.cell == "irnn" else _tanh(gates)).to(self.dtype),)

    def _level(self) -> float:
        """What the logit of the likeliest word usually is or exceeds.

        bfloat16 has 8 bits: a logit of 6 is up to 0.016 off, and captions that are about as likely as one another
        change places. A logit that lies near 0 is more exact, and only the differences of logits matter.
        """
        features = torch.rand(8, FEATURE_SIZE, generator=torch.Generator().manual_seed(0)).to(self.table.device)
        state, largest = self.start(features), []
        tokens = torch.arange(8, device=features.device) % len(self.table)
        for _ in range(8):  # captions of photos that do not exist, each word the likeliest
            logits, state = self.step(tokens, state)
            value, tokens = logits.max(dim=1)
            largest.append(value.float())
        return float(torch.cat(largest).quantile(0.25).nan_to_num(0.0, 0.0, 0.0))

    def _weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input and hidden weights and biases of a layer; those of an LSTM's gate g are doubled.

        tanh(x) = 2 sigmoid(2 x) - 1, and so one sigmoid does for all four gates.
        """
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = [getattr(self._decoder.rnn, f"{name}_l{layer}").detach() for name in names]
        if self.cell == "lstm":
            found = [torch.cat([i, f, 2 * g, o]) for i, f, g, o in (w.chunk(4) for w in found)]
        w_ih, w_hh, b_ih, b_hh = found
        return w_ih, w_hh, b_ih, b_hh


def _sigmoid(x: Tensor) -> Tensor:
    """The logistic function, in place.

    On a processor torch computes what is left over after whole vectors, at the end and between threads, in other
    arithmetic: the last bit of a row would depend on the rows beside it. So it gets whole vectors only, and so few at
    once that it does not divide them among threads. (As 1 / (1 + exp(-x)) bits stay too, in thrice the time.)
    """
    size = x.numel()
    over = size % _VECTOR
    alone = not over and (size <= _SERIAL or torch.get_num_threads() == 1)
    if alone or x.device.type != "cpu":
        return x.sigmoid_()
    whole, rest = x.view(-1).tensor_split((size - over,))
    for first in range(0, len(whole), _SERIAL):
        whole[first : first + _SERIAL].sigmoid_()
    if over:
        rest.copy_(torch.nn.functional.pad(rest, (0, _VECTOR - over)).sigmoid_()[:over])
    return x


def _tanh(x: Tensor) -> Tensor:
    """The hyperbolic tangent; torch's own takes a processor five times as long as a sigmoid."""
    return _sigmoid(2 * x).mul_(2).sub_(1)


def _numbers(parts: Float[Tensor, "layers batch hidden"]) -> Int[Tensor, "1 batch 1"]:
    """A number for each row."""
    return torch.arange(parts.shape[1], device=parts.device)[None, :, None]


def _distinct(numbers: Int[Tensor, " batch"]) -> tuple[Tensor | None, Tensor | None]:
    """One row of each number, and for every row which of these it equals; None stands for all rows.

    A GPU would have to be waited for until it has counted them: there, every row stands for itself. So it does where
    there are so few that the weights, which are read for any number of rows, take most of the time.
    """
    if numbers.device.type != "cpu" or len(numbers) <= _FEW:
        return None, None
    distinct, copies = torch.unique(numbers, return_inverse=True)
    rows = torch.empty_like(distinct).scatter_(0, copies, torch.arange(len(numbers)))
    return rows, copies


def _rows(x: Tensor, which: Tensor | None) -> Tensor:
    return x if which is None else x.index_select(0, which)


def linear(weight: Tensor, bias: Tensor) -> Layer:
    """`x -> x W^T + b` with everything laid out for the device; the bias is fp32."""
    weight, bias = weight.detach(), bias.detach()
    rounded = bias.to(weight.dtype)
    return _onednn_linear(weight, bias) or (lambda x: torch.nn.functional.linear(x, weight, rounded))


def _onednn_linear(weight: Tensor, bias: Tensor) -> Layer | None:
    """The product of oneDNN with weights packed beforehand, or None where this torch or device does not offer it.

    These are the operators that `torch.compile` puts in place of a linear layer. They sum each row in the same order
    however many rows there are, which MKL behind `torch.nn.functional.linear` does not; and in fp32 on AMD processors
    they are 1.5 times as fast as it.
    """
    mkldnn: Any = torch.backends.mkldnn
    if weight.device.type != "cpu" or not mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 320)
        product = torch.ops.mkldnn._linear_pointwise

        def linear(x: Tensor) -> Tensor:
            if len(x) == 1:  # a single row would be summed in another order than the same row among others
                x = torch.cat([x, x])
                return linear(x)[:1]
            result: Tensor = product(x, packed, bias, "none", [], "")
            return result

        linear(weight.new_zeros(2, weight.shape[1]))
    except (AttributeError, RuntimeError):  # absent, or without a kernel for this processor
        return None
    return linear

"""A decoder made ready to write: the same network as `Decoder`, arranged for `step` alone.

Three things make it several times faster than `Decoder.step`, and none changes what is computed:

- what the first layer makes of a word depends on the word alone, so it is computed once for the whole vocabulary and
  looked up after that: one matrix product less a step;
- weights are laid out once as the matrix kernels want them (oneDNN's blocked layout on a processor);
- bfloat16 where the device is fast at it. Products are summed in fp32 there, and the cell state `c`, which carries
  what was written so far, stays fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from captioner.config import Precision
from captioner.decoder import Decoder, State

_Linear = Callable[[Tensor], Tensor]


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
        self.initial = _linear(decoder.initial.weight.float(), decoder.initial.bias.float())
        weights = [self._weights(layer) for layer in range(self.layers)]
        w_ih, w_hh, b_ih, b_hh = weights[0]
        if self.cell == "gru":  # the reset gate comes between the hidden bias and the sum, so that one stays apart
            table, hidden_bias = torch.addmm(b_ih, decoder.embedding.weight, w_ih.t()), b_hh
        else:
            table, hidden_bias = torch.addmm(b_ih + b_hh, decoder.embedding.weight, w_ih.t()), torch.zeros_like(b_hh)
        #: What the first layer makes of each word, `(vocabulary, gates * hidden)`.
        self.table = table.to(self.dtype)

        def linear(weight: Tensor, bias: Tensor) -> _Linear:
            return _linear(weight.to(self.dtype), bias.to(self.dtype))

        self.hidden = [linear(w_hh, hidden_bias)] + [linear(w, b) for _, w, _, b in weights[1:]]
        self.input = [linear(w, b) for w, _, b, _ in weights[1:]]
        self.output = linear(decoder.output.weight, decoder.output.bias)

    def start(self, features: Float[Tensor, "batch 4096"]) -> State:
        """The hidden state that a photo sets; computed in fp32.

        Args:
            features: what the encoder saw, `(batch, 4096)`.

        Returns:
            h0 in the precision of the products, and c0 in fp32 for an LSTM, `(layers, batch, hidden)` each.
        """
        h0, *c0 = self._decoder.arrange(self.initial(self._decoder.normalise(features.float())))
        return (h0.to(self.dtype), *(c.float() for c in c0))

    def step(self, tokens: Int[Tensor, " batch"], state: State) -> tuple[Float[Tensor, "batch vocabulary"], State]:
        """Read one word, and say how likely each word is to follow.

        Args:
            tokens: ids of the words read, `(batch,)`.
            state: hidden state, from `start` or from the step before.

        Returns:
            Logits in the precision of the products, `(batch, vocabulary)`, and the next hidden state.
        """
        from_input = self.table.index_select(0, tokens)
        layers: list[tuple[Tensor, ...]] = []
        for layer in range(self.layers):
            if layer > 0:
                from_input = self.input[layer - 1](layers[-1][0])
            previous = tuple(part[layer] for part in state)
            layers.append(self._cell(from_input, self.hidden[layer](previous[0]), previous))
        following = tuple(torch.stack(parts) for parts in zip(*layers, strict=True))
        return self.output(layers[-1][0]), following

    def _cell(self, from_input: Tensor, from_hidden: Tensor, previous: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of one layer; the gates of an LSTM come in the order i, f, o, g (see `_weights`)."""
        size = from_hidden.shape[1]
        if self.cell == "lstm":
            gates = from_input.add_(from_hidden)
            i, f, o = gates[:, : size // 4 * 3].sigmoid_().chunk(3, dim=1)
            g = gates[:, size // 4 * 3 :].tanh_()
            c = torch.addcmul(f * previous[1], i, g)
            return torch.tanh(c.to(self.dtype)).mul_(o), c
        if self.cell == "gru":
            hidden = size // 3
            r, z = (from_input[:, : 2 * hidden] + from_hidden[:, : 2 * hidden]).sigmoid_().chunk(2, dim=1)
            n = torch.addcmul(from_input[:, 2 * hidden :], r, from_hidden[:, 2 * hidden :]).tanh_()
            return (torch.lerp(n, previous[0], z),)
        sums = from_input.add_(from_hidden)
        return (sums.relu_() if self.cell == "irnn" else sums.tanh_(),)

    def _weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input and hidden weights and biases of a layer; gates i, f, g, o of an LSTM become i, f, o, g."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        found = [getattr(self._decoder.rnn, f"{name}_l{layer}").detach() for name in names]
        if self.cell == "lstm":  # the three sigmoids side by side: one call for all
            found = [torch.cat([w.chunk(4)[gate] for gate in (0, 1, 3, 2)]) for w in found]
        w_ih, w_hh, b_ih, b_hh = found
        return w_ih, w_hh, b_ih, b_hh


def _linear(weight: Tensor, bias: Tensor) -> _Linear:
    """`x -> x W^T + b` with everything laid out for the device."""
    weight, bias = weight.detach(), bias.detach()
    return _onednn_linear(weight, bias) or (lambda x: torch.nn.functional.linear(x, weight, bias))


def _onednn_linear(weight: Tensor, bias: Tensor) -> _Linear | None:
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

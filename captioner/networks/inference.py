"""A trained network as the search wants it: `TorchEngine` answers a `StepModel`'s questions with torch.

The networks that are handed in stay as they are: an engine has copies of their modules in evaluation mode, which share
all weights that need no conversion. After the weights have changed, make another engine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from captioner.config import Precision
from captioner.decoding.step import Floats, Integers, Likeliest
from captioner.errors import CaptionerError
from captioner.networks.decoder import Decoder, HiddenState
from captioner.networks.encoder import Encoder

Network = TypeVar("Network", bound=nn.Module)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.get_device_capability(device) >= (8, 0))
    mkldnn: Any = torch.backends.mkldnn
    if device.type != "cpu" or not mkldnn.is_available():
        return False
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, test, bool)()) for test in tests)


def trains_in_bf16(device: torch.device) -> bool:
    """Whether torch can train recurrent layers in bfloat16 on the device.

    On a processor oneDNN computes them, and has no bfloat16 for processors without AVX-512 or the like.
    """
    mkldnn: Any = torch.backends.mkldnn
    if device.type != "cpu" or not mkldnn.is_available():
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dtype_for(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of number that a precision means on a device.

    "auto" is bf16 where the device is fast at it, fp16 on other GPUs, and fp32 elsewhere.

    Raises:
        CaptionerError: the device does not compute in fp16.
    """
    if precision == "fp16":
        if device.type != "cuda":
            raise CaptionerError(f"precision is fp16, which is for GPUs, and the device is {device}; give fp32 or bf16")
        return torch.float16
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" or has_fast_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


class TorchDecoder:
    """A decoder as a `StepModel`, for photos whose features are known.

    In bf16 and fp16 the matrix products are rounded; cell states, the output layer's bias and the softmax are fp32.
    torch promises no order of equally likely words.
    """

    def __init__(
        self, decoder: Decoder, precision: Precision = "auto", device: torch.device | str | None = None
    ) -> None:
        """Copy what has to be converted or moved.

        Args:
            decoder: in any mode; dropout is left out.
            precision: of the matrix products.
            device: where to compute; None: where the decoder is.
        """
        self.device = torch.device(device or decoder.output.weight.device)
        self.dtype = dtype_for(precision, self.device)
        self.vocabulary_size = decoder.vocabulary_size
        self._decoder = _inferring(decoder, self.device, self.dtype)
        # Rounded logits would often be equal; the bias, added in fp32 to the rounded product, keeps words apart.
        self._bias = decoder.output.bias.detach().to(self.device, torch.float32)
        self._decoder.output.register_parameter("bias", None)

    @torch.inference_mode()
    def start(self, features: Floats) -> HiddenState:
        """See `StepModel.start`; the state is that of `Decoder`."""
        with self._rounded():
            there = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(self.device)
            return tuple(part.float() for part in self._decoder.start(there))

    @torch.inference_mode()
    def step(
        self, tokens: Integers, parents: Integers, state: HiddenState, count: int, named: Integers
    ) -> tuple[Likeliest, HiddenState]:
        """See `StepModel.step`."""
        tokens_there, parents_there, named_there = self._sent(tokens, parents, named)
        logprob, state = self._following(tokens_there, parents_there, state)
        best = logprob.topk(count, dim=1)
        # One copy waits for a GPU once; fp32 holds the id of any word exactly.
        parts = (best.values, best.indices.to(torch.float32), logprob.index_select(1, named_there))
        values, words, known = np.split(torch.cat(parts, dim=1).cpu().numpy(), (count, 2 * count), axis=1)
        return Likeliest(values, words.astype(np.int64), known), state

    @torch.inference_mode()
    def step_all(self, tokens: Integers, parents: Integers, state: HiddenState) -> tuple[Floats, HiddenState]:
        """See `StepModel.step_all`."""
        tokens_there, parents_there = self._sent(tokens, parents)
        logprob, state = self._following(tokens_there, parents_there, state)
        return logprob.cpu().numpy(), state

    def _following(self, tokens: Tensor, parents: Tensor, state: HiddenState) -> tuple[Tensor, HiddenState]:
        """Log-probabilities of all words, `(rows, vocabulary)`, in fp32, and the next state."""
        with self._rounded():
            logits, state = self._decoder.step(tokens, tuple(part.index_select(1, parents) for part in state))
        return logits.float().add_(self._bias).log_softmax(dim=1), state

    def _sent(self, *arrays: Integers) -> Sequence[Tensor]:
        """Arrays on the device, by one copy."""
        together = torch.from_numpy(np.concatenate(arrays))
        if self.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            together = together.pin_memory()
        return torch.split(together.to(self.device, non_blocking=True), [len(array) for array in arrays])

    def _rounded(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class TorchEngine(TorchDecoder):
    """An encoder and a decoder: photos to features, features to words."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        precision: Precision = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        """Copy what has to be converted or moved.

        Args:
            encoder: in any mode; it standardises by the statistics that it learned.
            decoder: see `TorchDecoder`.
            precision: of matrix products and convolutions.
            device: where to compute; None: where the decoder is.
        """
        super().__init__(decoder, precision, device)
        self.encoder, self.decoder = encoder, decoder  # as they were handed in: to be saved and exported
        self.image_size = encoder.config.image_size
        with torch.no_grad():
            shared = _inferring(encoder, encoder.mean.device, torch.float32)
            # Batch normalisation becomes part of the convolution before it (Jacob et al. 2018, section 3.2).
            shared.body = fuse(shared.body, inplace=True, no_trace=True)
            self._encoder = _inferring(shared, self.device, self.dtype)

    @torch.inference_mode()
    def features(self, photos: npt.NDArray[np.uint8]) -> Floats:
        """Look at photos.

        Args:
            photos: RGB, 0 to 255, `(batch, 3, height, width)`.

        Returns:
            One row of 4096 non-negative numbers for each, `(batch, 4096)`.
        """
        with self._rounded():
            tapped = self._encoder.map(torch.from_numpy(np.ascontiguousarray(photos)).to(self.device))
        result: Floats = self._encoder.flatten(tapped.float()).cpu().numpy()
        return result


def _inferring(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """A copy of a network's modules in evaluation mode, on a device, with parameters of a type.

    Tensors that are on the device and of the type already are shared with the network.
    """
    tensors: dict[int, Any] = {id(buffer): buffer.to(device) for buffer in network.buffers()}
    for parameter in network.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to(device, dtype), requires_grad=False)
    return copy.deepcopy(network, tensors).eval()

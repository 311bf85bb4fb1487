"""A CNN made ready to look: the same network as `Encoder`, arranged for inference alone.

- batch normalisation becomes part of the convolution before it (Jacob et al. 2018, section 3.2);
- weights are laid out once as oneDNN wants them, not in every call: that takes a third of the time for a single
  photo, and sums every photo in the same order, be it alone or among others;
- bfloat16 where the device is fast at it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses
from torch.nn.utils.fusion import fuse_conv_bn_weights

from captioner.config import Precision
from captioner.networks.encoder import Encoder
from captioner.networks.inference import Layer, dtype_for, linear


class PreparedEncoder:
    """An encoder for inference; later changes of its weights are not seen."""

    @torch.inference_mode()
    def __init__(self, encoder: Encoder, precision: Precision = "auto") -> None:
        """Copy and arrange the weights.

        Args:
            encoder: in evaluation mode.
            precision: of the products; "auto" is bf16 where the encoder's device is fast at it.
        """
        self._encoder = encoder
        self.dtype = dtype_for(precision, encoder.mean.device)
        body: fx.GraphModule = encoder.body
        self._network = fx.GraphModule({**dict(body.named_modules()), **_layers(body, self.dtype)}, body.graph)
        size = encoder.config.image_size
        self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=encoder.mean.device))  # lays the weights out

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4096"]:
        """Look at photos, see `Encoder.forward`."""
        tapped: dict[str, Tensor] = self._network(self._encoder.standardise(images).to(self.dtype))
        return self._encoder.flatten(tapped["tap"].float())


def _layers(body: fx.GraphModule, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Layers to take the place of a network's own, by their names."""
    modules = dict(body.named_modules())
    found: dict[str, nn.Module] = {}
    for node in body.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            after = next(iter(node.users))
            norm = modules.get(after.target) if after.op == "call_module" and len(node.users) == 1 else None
            if isinstance(norm, nn.BatchNorm2d):
                found[after.target] = nn.Identity()
            found[node.target] = _Convolution(module, norm if isinstance(norm, nn.BatchNorm2d) else None, dtype)
        elif isinstance(module, nn.Linear) and dtype != module.weight.dtype:  # VGG's are too large to have them twice
            found[node.target] = _Linear(module, dtype)
    return found


class _Linear(nn.Module):
    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self._product = linear(module.weight.to(dtype), module.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class _Convolution(nn.Module):
    """A convolution, and the normalisation that follows it, as one."""

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = convolution.weight, convolution.bias
        if norm is not None:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
        weight = weight.detach().to(dtype, memory_format=torch.channels_last)
        self._weight, self._bias = weight, None if bias is None else bias.detach().to(dtype)
        how = convolution.padding, convolution.stride, convolution.dilation
        self._how: tuple[Any, ...] = (*map(tuple, how), convolution.groups)
        self._product: Layer | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self._product is None:  # its layout depends on how large the map is
            self._product = self._onednn(x) or self._plain
        return self._product(x)

    def _plain(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self._how
        return F.conv2d(x, self._weight, self._bias, stride, padding, dilation, groups)

    def _onednn(self, x: Tensor) -> Layer | None:
        """As `prepared._onednn_linear`: None where this torch or device does not offer it."""
        mkldnn: Any = torch.backends.mkldnn
        if x.device.type != "cpu" or not mkldnn.is_available():
            return None
        try:
            one = (1, *x.shape[1:])
            packed = torch.ops.mkldnn._reorder_convolution_weight(self._weight, *self._how, one)
            product = torch.ops.mkldnn._convolution_pointwise

            def convolution(x: Tensor) -> Tensor:
                result: Tensor = product(x, packed, self._bias, *self._how, "none", [], "")
                return result

            convolution(x)
        except (AttributeError, RuntimeError):
            return None
        return convolution

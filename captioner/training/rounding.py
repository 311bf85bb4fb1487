"""The precision that training computes in: autocast, and the scale that keeps gradients in fp16 from vanishing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captioner.config import Precision
from captioner.errors import CaptionerError
from captioner.networks.inference import dtype_for, trains_in_bf16


class Rounding:
    """Rounds matrix products and convolutions in training; losses, weights and their moments are fp32."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        """Choose the type of number.

        Products in fp32 are computed in fp32: TensorFloat-32, which torch uses in convolutions unless told otherwise,
        rounds like bf16 and half, and is switched off for this process.

        Args:
            precision: "auto" is what `accelerate launch --mixed_precision` said, else what the device is fast at.
            device: where to compute.

        Raises:
            CaptionerError: the device does not compute in this precision.
        """
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto")
        if precision == "auto" and asked in ("no", "bf16", "fp16"):
            precision = "fp32" if asked == "no" else asked  # type: ignore[assignment]
        self._device = device
        self.dtype = dtype_for(precision, device)
        if self.dtype == torch.bfloat16 and not trains_in_bf16(device):
            raise CaptionerError("precision is bf16, which this processor cannot train in; give auto or fp32")
        # On GPUs bf16 needs the scale too: under autocast of any type torch computes cuDNN's recurrent layers in fp16
        # (ATen/cudnn/AutocastRNN.cpp), whose small gradients would vanish.
        scaled = self.dtype == torch.float16 or (device.type == "cuda" and self.dtype == torch.bfloat16)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def autocast(self) -> torch.autocast:
        """A context in which products are rounded."""
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is to be computed."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimiser: torch.optim.Optimizer) -> None:
        """Bring the gradients of an optimiser's weights to their true size."""
        self._scaler.unscale_(optimiser)

    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Take a step, unless a gradient in fp16 became infinite: then a smaller scale is tried next time."""
        self._scaler.step(optimiser)
        self._scaler.update()

    def state(self) -> dict[str, float]:
        """The scale, to be saved; empty where there is none."""
        return {name: float(value) for name, value in self._scaler.state_dict().items()}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on with a scale that was saved."""
        if self._scaler.is_enabled() and state:
            whole: dict[str, Any] = {**state, "growth_interval": int(state["growth_interval"])}
            self._scaler.load_state_dict({**whole, "_growth_tracker": int(state["_growth_tracker"])})

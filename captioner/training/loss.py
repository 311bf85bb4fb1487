"""Output layer, softmax and cross-entropy in one, whose logits are never all in memory.

The logits of a batch are its largest numbers by far: 1,400 words x 9,487 logits are 53 MB, which a plain loss reads and
writes a dozen times. Here a few rows at a time are computed, turned into their gradient while a cache still holds them,
and kept in the precision of the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

#: Words whose logits are computed together: few enough for a processor's cache, enough to fill a GPU.
_ROWS = {"cpu": 256, "cuda": 8192}


def word_losses(
    hidden: Float[Tensor, "words hidden"],
    output: torch.nn.Linear,
    targets: Int[Tensor, " words"],
    weights: Float[Tensor, " words"] | None = None,
    *,
    smoothing: float = 0.0,
    never: Int[Tensor, " some"] | None = None,
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of words, `weights * -log softmax(output(hidden))[target]`.

    Under autocast the matrix products are rounded; softmax and losses are fp32.

    Args:
        hidden: input of the output layer.
        output: the output layer.
        targets: the words to be predicted.
        weights: of each word's loss; None: all count alike.
        smoothing: share of the target probability that is spread over all words (Szegedy et al. 2016).
        never: words that get no probability at all, and no gradient.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):  # which would round more than the products
        result: Tensor = _WordLosses.apply(
            hidden.to(dtype), output.weight.to(dtype), output.bias, targets, weights, smoothing, never
        )
    return result


class _WordLosses(torch.autograd.Function):
    """The gradient of the logits is computed together with the loss, and held until `backward` multiplies with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        smoothing: float,
        never: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = any(ctx.needs_input_grad)
        gradients = hidden.new_empty(len(hidden), len(weight)) if wanted else None
        of_bias = torch.zeros_like(bias)
        rounded = bias.to(hidden.dtype)
        rows = _ROWS.get(hidden.device.type, len(hidden) or 1)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, rounded).float()
            if never is not None:
                logits.index_fill_(1, never, -torch.inf)
            target = targets[part, None]
            logits -= logits.amax(1, keepdim=True)
            expected = (1 - smoothing) * logits.gather(1, target)
            if smoothing:
                expected += smoothing * logits.mean(1, keepdim=True)
            sums = logits.exp_().sum(1, keepdim=True)
            losses = sums.log() - expected
            total += (losses if weights is None else losses * weights[part, None]).sum()
            if gradients is not None:  # of softmax and cross-entropy: the probabilities, less those of the targets
                logits /= sums
                logits.scatter_add_(1, target, torch.full_like(sums, smoothing - 1))
                if smoothing:
                    logits -= smoothing / len(weight)
                of_bias += logits.sum(0) if weights is None else weights[part] @ logits
                gradients[part] = logits
        ctx.save_for_backward(hidden, weight, gradients, of_bias, weights)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, gradients, of_bias, weights = ctx.saved_tensors
        # The weights of the words, and the scale of fp16, go into the small matrices, and in fp32: probabilities times
        # a small weight would vanish in fp16, and a large scale would be infinite.
        scale = gradient.view(1, 1) if weights is None else gradient * weights[:, None]
        of_hidden = ((gradients @ weight) * scale).to(hidden.dtype)
        of_weight = gradients.T @ (hidden * scale).to(hidden.dtype)
        return of_hidden, of_weight, of_bias * gradient, None, None, None, None

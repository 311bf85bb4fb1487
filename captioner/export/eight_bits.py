"""Numbers in 8 bits: activations from 0 to 255 with fixed scales, weights from -63 to 63 with a scale a row.

    real = scale * (stored - zero)

Scales of activations are fixed when a model is exported, never computed from a batch, so that a caption depends on its
photo alone. Weights have 7 of the 8 bits: processors without VNNI add two products of 8 x 8 bits in 16 bits, and
2 x 255 x 63 = 32,130 is the most that fits there, so that every processor computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Largest stored weight.
MOST = 63
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Scale:
    """How an activation is stored: `real = step * (stored - zero)`, with `stored` from 0 to 255."""

    step: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Scale:
        """The finest one that reaches from `low` to `high`, and has 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / 255, 1e-8)
        return cls(float(np.float32(step)), round(-low / step))


def codes(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Store weights: the largest of each row becomes 63 or -63.

    Args:
        rows: `(rows, ...)`.

    Returns:
        The stored numbers, of the same shape, and a step a row: weight = step * stored, to half a step.
    """
    flat = rows.reshape(len(rows), -1)
    step = np.maximum(np.abs(flat).max(axis=1) / MOST, _TINY).astype(np.float32)
    return np.rint(flat / step[:, None]).astype(np.int8).reshape(rows.shape), step

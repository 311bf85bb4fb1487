"""The learning rate over a run."""

from __future__ import annotations

import math


def warmed_cosine(step: int, steps: int, warmup: int, last: float = 0.0) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine (Loshchilov & Hutter 2017).

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: steps until the share is 1; a quarter of all at most, so that short runs learn too.
        last: what the cosine falls to, 0 to 1.
    """
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

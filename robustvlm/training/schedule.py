"""Learning rates over the steps."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total: int, peak: float, warmup: int = 0, final: float = 0.0) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine from `peak` to `final` * peak.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, without restarts.

    Example:
        >>> [round(learning_rate(s, total=6, peak=1.0, warmup=2), 3) for s in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

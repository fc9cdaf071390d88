"""ET3: the image moves to lower energy, minus the log-sum-exp of its logits, before it is answered.

Mirza, D'Orazio, Melamed and Masi, CVPR 2026 (arXiv 2603.26984).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from robustvlm.defenses.zoo.inner import recomputed, score_gradient, straight, unit_rows, within


def energy(logits: Tensor) -> Tensor:
    """Return -log sum exp of logits [B, K] -> [B].

    Example:
        >>> energy(torch.zeros(1, 1)).item()
        -0.0
    """
    return -logits.logsumexp(1)


def energy_step(
    logits: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, *, step: float, reach: float, graph: bool = False
) -> Tensor:
    """Return `y` moved by an L2 length `step` down the energy, clipped to x +- `reach` and [0, 1].

    Args:
        logits: images [B, 3, H, H] to [B, K]; y: where the image is by now; x: where it began.
        graph: leave the result differentiable in `y` and `x`.
    """
    _, grad = score_gradient(lambda v: energy(logits(v)), y, graph=graph)
    return within(y - step * unit_rows(grad), x, reach)


def descended(
    logits: Callable[[Tensor], Tensor], x: Tensor, *, steps: int, step: float, reach: float, through: bool = False
) -> Tensor:
    """Return images after `steps` steps of `energy_step`.

    Args:
        through: gradients pass the steps themselves; otherwise each is a constant (BPDA).

    Example:
        >>> x, flat = torch.full((1, 3, 1, 1), 0.5), lambda v: v.flatten(1)[:, :2]
        >>> (descended(flat, x, steps=1, step=0.1, reach=1.0) - x).flatten().round(decimals=4)
        tensor([0.0707, 0.0707, 0.0000])
    """
    if step == 0 or reach == 0:
        return x
    move = partial(energy_step, logits, step=step, reach=reach)
    y = x if through else x.detach()
    for _ in range(steps):
        y = recomputed(move, partial(move, graph=True), y, x) if through else move(y, x.detach())
    return y if through else straight(x, y)

"""Projection onto a hyperplane inside the pixel box, the step of boundary attacks (Croce & Hein 2020, section 3.2).

Wanted, for every lane on its own, is the shortest delta with <w, delta> = gap and 0 <= x + delta <= 1. Pixel i can be
moved by at most `room_i` in the direction that helps (the one of sign(gap) w_i), and the shortest delta moves it by

    min(t, room_i)  in Linf norm,        min(t |w_i|, room_i)  in L2 norm,

with one level t for all pixels: the least one at which the gap is closed. The level that closes the gap is found by
fixing variables (Kiwiel 2008, "Variable fixing algorithms for the continuous quadratic knapsack problem"): solve
as if no pixel met its bound, fix the pixels that did, solve for the rest, until no further pixel is fixed. The level
rises from round to round, so a fixed pixel stays fixed and the result is exact after finitely many rounds; in practice
a handful, where sorting the pixels by their bounds would cost more than the rest of the attack.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.core.sums import row_sums


def step_to_plane(x: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    """Return the shortest delta [B, ...] with <normal, delta> = gap that keeps x + delta in [0, 1].

    Where no point of the box reaches the plane, the result leads to the box's point nearest to it: every pixel with a
    nonzero normal goes to its bound. A normal of zero gives a delta of zero.

    Args:
        x: points [B, ...] in the box [0, 1].
        normal: normals w of the planes, like `x`.
        gap: what <w, x> lacks to reach the plane, [B], either sign.
        norm: "Linf" or "L2", the length to be kept short.

    Example:
        >>> x, w = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, 1.0]])
        >>> step_to_plane(x, w, torch.tensor([0.4]), "Linf")
        tensor([[0.3000, 0.1000]])
    """
    w, flat = normal.flatten(1), x.flatten(1)
    # The plane is the same for any multiple of its normal and gap; this one's squares neither under- nor overflow.
    size = w.abs().amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    w, gap = w / size[:, None], gap / size
    direction = w.sign() * gap.sign()[:, None]
    weight = w.abs()
    # A point that rounding left a hair outside the box has no room rather than a negative one.
    room = torch.where(direction > 0, 1 - flat, flat).clamp_min(0)
    room = torch.where(direction == 0, 0, room)
    speed = torch.ones_like(weight) if norm == "Linf" else weight
    level = _level(weight, speed, room, gap.abs())[:, None]
    # Infinite levels mean that every pixel goes as far as it can, also one whose speed underflowed to zero.
    moved = torch.where(level.isinf(), room, torch.minimum(level * speed, room))
    return (direction * moved).reshape(x.shape)


def _level(weight: Tensor, speed: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Return the least t >= 0 [B] with sum_i weight_i min(t speed_i, room_i) = gap, infinite where there is none."""
    rate, capacity = weight * speed, weight * room
    free = (rate > 0) & (room > 0)
    while True:
        left = gap - row_sums(torch.where(free, 0, capacity))
        slope = row_sums(torch.where(free, rate, 0))
        level = torch.where(slope > 0, left / slope, torch.where(left > 0, torch.inf, 0.0))
        still_free = free & (level[:, None] * speed <= room)
        if torch.equal(still_free, free):
            return level.clamp_min(0)
        free = still_free

"""Proposals of the Linf Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithm 2), over lanes.

Every point it visits is a corner of the ball cut with the pixel range: each colour value is the box's `low` or `high`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.square_windows import bits, offsets, window

DRAWS = 4  # columns of the table of random numbers: row, column, signs, replacement for signs without effect


def start(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Return the first point: vertical stripes one pixel wide, a random end of the box per column and channel.

    Args:
        low, high: box of one image, [1, C, H, W].
    """
    signs = torch.rand(1, low.shape[1], 1, low.shape[3], generator=generator) < 0.5
    return torch.where(signs.to(low.device), high, low)


def propose(best: Tensor, low: Tensor, high: Tensor, side: Tensor, draws: Tensor) -> Tensor:
    """Return the best points with one square each moved to an end of the box per channel.

    A square whose draw repeats what is there already would waste a query; it gets one of the other sign patterns,
    drawn uniformly (*our reading* of the authors' code, which draws again until something changes).

    Args:
        best, low, high: [L, C, H, W].
        side: width of each lane's square, int64 [L].
        draws: uniform numbers in [0, 1), [L, DRAWS].

    Example:
        >>> low, high = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        >>> propose(low, low, high, torch.tensor([2]), torch.tensor([[0.0, 0.99, 0.9, 0.0]]))[0, 0, :2].tolist()
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    _, channels, height, width = best.shape
    inside = window(height, width, *offsets(draws[:, :2], side, height, width), side)
    patterns = 2**channels
    drawn = (draws[:, 2] * patterns).long()
    x = _paint(best, low, high, inside, bits(drawn, channels))
    idle = (x == best).flatten(1).all(1)
    other = drawn ^ (1 + (draws[:, 3] * (patterns - 1)).long())
    return _paint(best, low, high, inside, bits(torch.where(idle, other, drawn), channels))


def _paint(best: Tensor, low: Tensor, high: Tensor, inside: Tensor, signs: Tensor) -> Tensor:
    return torch.where(inside, torch.where(signs, high, low), best)

"""Proposals of the L2 Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithm 3), over lanes."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.square_windows import bits, offsets, relative, window
from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image, project
from robustvlm.core.sums import row_sums

DRAWS = 6  # columns of the table of random numbers: two window corners, signs, orientation
_TILES = 5  # the start covers the image with tiles of a fifth of its side
_TINY = 1e-12


def start(x0: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """Return the first point for one image [1, C, H, W]: a grid of bumps with random signs and orientations."""
    _, channels, height, width = x0.shape
    side = max(min(height, width) // _TILES, 1)
    delta = torch.zeros_like(x0)
    top, left = (height % side) // 2, (width % side) // 2
    rows, columns = range(top, height - side + 1, side), range(left, width - side + 1, side)
    places = [(row, column) for row in rows for column in columns]
    draws = torch.rand(len(places), channels + 1, generator=generator) < 0.5
    for (row, column), (turned, *signs) in zip(places, draws.tolist(), strict=True):
        at, across, size = (torch.tensor([value]) for value in (row, column, side))
        tile = bump(height, width, at, across, size, torch.tensor([turned])).to(x0)
        delta += tile * (torch.tensor(signs).to(x0).view(1, -1, 1, 1) * 2 - 1)
    return on_sphere(delta, x0, threat)


def propose(best: Tensor, x0: Tensor, side: Tensor, draws: Tensor, threat: ThreatModel) -> Tensor:
    """Return the best points with the perturbation of one window moved into another, shaped as a two-sided bump.

    In the first window the new perturbation is the sum of the old one and a bump of random sign, both normalised, with
    the norm that both windows had, plus the part of eps^2 that clipping had left unused; the second window is emptied.

    Args:
        best, x0: [L, C, H, W].
        side: width of each lane's windows, int64 [L].
        draws: uniform numbers in [0, 1), [L, DRAWS].
    """
    _, channels, height, width = best.shape
    delta = best - x0
    corner, corner2 = (offsets(draws[:, at : at + 2], side, height, width) for at in (0, 2))
    first, second = (window(height, width, *place, side) for place in (corner, corner2))
    signs = bits((draws[:, 4] * 2**channels).long(), channels).to(best.dtype) * 2 - 1
    shape = bump(height, width, *corner, side, draws[:, 5] < 0.5).to(best.dtype)
    moved = shape * signs + _unit(delta * first)
    unused = (threat.eps**2 - l2_norms(delta) ** 2).clamp_min(0) / channels
    available = (_energy(delta * (first | second)) + per_image(unused, delta)).sqrt()
    delta = torch.where(first, _unit(moved) * available, torch.where(second, torch.zeros_like(delta), delta))
    return on_sphere(delta, x0, threat)


def bump(height: int, width: int, top: Tensor, left: Tensor, side: Tensor, turned: Tensor) -> Tensor:
    """Return eq. 2 of the paper as images [L, 1, H, W], zero outside the window and of norm 1.

    One half of the window is positive and the other negative, each with a peak at its centre that falls off in
    square rings; `turned` [L] exchanges rows and columns.

    Example:
        >>> corner = torch.tensor([0])
        >>> values = bump(2, 2, corner, corner, torch.tensor([2]), torch.tensor([False]))
        >>> [[round(value, 3) for value in row] for row in values[0, 0].tolist()]
        [[0.139, 0.693], [-0.139, -0.693]]
    """
    rows, columns = relative(height, width, top, left)
    inside = window(height, width, top, left, side)
    sides, turn = side.view(-1, 1, 1, 1), turned.view(-1, 1, 1, 1)
    across, along = torch.where(turn, columns, rows), torch.where(turn, rows, columns)
    upper = across < sides // 2
    half = torch.where(upper, sides // 2, sides - sides // 2)
    ring = torch.maximum(
        (torch.where(upper, across, across - sides // 2) - half // 2).abs(), (along - sides // 2).abs()
    )
    rings = torch.maximum(half // 2, sides // 2) + 1
    sums = _sums_of_squares(max(height, width) + 1).to(ring.device)
    values = torch.where(inside, sums[rings] - sums[ring.clamp_max(max(height, width))], 0.0)
    above, below = values * (inside & upper), values * (inside & ~upper)
    return _unit(_unit(above) - _unit(below))


def on_sphere(delta: Tensor, x0: Tensor, threat: ThreatModel) -> Tensor:
    """Return x0 + delta with delta scaled to length eps, clipped to [0, 1]; never outside the ball."""
    scale = threat.eps / l2_norms(delta).clamp_min(_TINY)
    return project(x0 + delta * per_image(scale, delta), x0, threat)


def _energy(values: Tensor) -> Tensor:
    """Return the sum of squares of every channel of every image, [L, C, H, W] -> [L, C, 1, 1]."""
    return row_sums((values * values).flatten(0, 1)).view(*values.shape[:2], 1, 1)


def _unit(values: Tensor) -> Tensor:
    """Normalise every channel of every image; zeros stay zeros."""
    return values / _energy(values).sqrt().clamp_min(_TINY)


def _sums_of_squares(count: int) -> Tensor:
    """Return s[k] = sum over m = 1..k of 1 / m^2, for k = 0..count, rounded to float32 at the end."""
    terms = 1 / torch.arange(1, count + 1, dtype=torch.float64) ** 2
    return torch.cat([torch.zeros(1), terms.cumsum(0).float()])

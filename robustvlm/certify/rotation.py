"""Rotations between sampled angles: how far apart in l2 they are at most, and the angles that cover a range.

*Theorem (T30).* Let x_t be the image x turned by t, and cells [a_j, b_j] with a centre c_j in each cover the angles
from -A to A, such that |x_t - x_{c_j}| <= E_j for all t in the cell. If a smoothed classifier keeps the class y within
the l2 radius r_j of x_{c_j}, and r_j > E_j for all j, its class is y at x_t for every |t| <= A (Li et al., CCS 2021,
who bound the interpolation of all angles by one number; here each cell has its own, and each image its own cells).

*The bound.* Read at (r, s), a pixel of x_t is a bilinear function on each square of the lattice, whose slope down lies
between the differences of the left and the right pair of corners, and that to the right between those of the upper and
the lower. Turned by dt the place moves by (t_r, t_s) dt, |(t_r, t_s)| = rho, its distance from the centre. Over an
interval of length w the place stays within rho w / 2 of that of the middle, and t_r and t_s change by no more. So with
D and R the largest differences (down, right) among the squares that this box meets,

    |x_t(p) - x_t'(p)| <= ((|t_r| + rho w / 2) D + (|t_s| + rho w / 2) R) |t - t'|,

and the root of the sum of squares over pixels and channels is a Lipschitz constant L of x_t in l2 on the interval. Any
angle is within w / 2 of an end, so that |x_t - x_c| <= max(|x_a - x_c|, |x_b - x_c|) + L w / 2 between ends a and b, of
which the distances are computed (a two-level bound as in Li et al., with the fine level as fine as the bound asks for).

*No union over angles.* Let the cells be tested in a fixed order, from the inside outwards, up to the first that fails.
If the range reported is too large, it contains a wrong angle; of the cells that contain one let j be the first in the
order, which depends on no sample. Cell j was passed, so that r_j > E_j was found where it is false: probability at most
alpha, whatever the number of cells. Label, reach and order come from the pilot, the image and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.certify.threats.plane import margin_of, offsets, places, rotate
from robustvlm.errors import UserError

_FINE = 0.0625
"""Part of the reach that is left to what lies between two fine angles."""
_ROUNDING = 2.0**-21
"""Of a pixel: what the rounding of centre and rotated image to float32 may come to, several times over."""
_BOX = 0.45
"""How far a place may move from that of the middle: less than half a pixel, so that it meets two squares each way."""
_STEEP, _FIRST = 1.5, 1e-3


def lipschitz(image: Tensor, start: float, end: float) -> float:
    """Return a bound of |x_t - x_t'| / |t - t'| over angles (radians) of an interval, of an image [C, H, W].

    Raises:
        UserError: the interval is too long for the bound.

    Example:
        >>> lipschitz(torch.zeros(3, 8, 8), 0.0, 0.01)
        0.0
    """
    _, height, width = image.shape
    down, right = offsets(height, width)
    rho = torch.hypot(down, right)
    half = 0.5 * abs(end - start)
    moved = rho * half + 1e-9
    if float(moved.max()) > _BOX:
        raise UserError(f"an interval of {abs(end - start):g} radians is too long for an image of {height} x {width}")
    middle = 0.5 * (start + end)
    border = margin_of(height, width)
    wide = torch.nn.functional.pad(image.detach().double().cpu(), [border] * 4)
    steep_down = wide.diff(dim=1).abs()
    steep_right = wide.diff(dim=2).abs()
    rows, columns = places(height, width, middle)
    top, bottom = ((rows + sign * moved).floor().long() + border for sign in (-1.0, 1.0))
    left, last = ((columns + sign * moved).floor().long() + border for sign in (-1.0, 1.0))
    most_down = torch.stack([steep_down[:, i, j] for i in (top, bottom) for j in (left, left + 1, last + 1)]).amax(0)
    most_right = torch.stack([steep_right[:, i, j] for i in (top, top + 1, bottom + 1) for j in (left, last)]).amax(0)
    c, s = math.cos(middle), math.sin(middle)
    along_down, along_right = (c * right - s * down).abs() + moved, (s * right + c * down).abs() + moved
    return float((along_down * most_down + along_right * most_right).norm()) * (1.0 + 1e-9)


@dataclass(frozen=True)
class Cell:
    """Angles in degrees from `inner` to `outer`, all of which are within `distance` in l2 of the image at `centre`.

    The first cell holds 0 and goes from `inner` below it to `outer` above; `near` is then 0, else |inner|.
    """

    centre: float
    inner: float
    outer: float
    distance: float

    @property
    def near(self) -> float:
        """The least absolute angle of the cell."""
        return 0.0 if self.inner * self.outer < 0.0 else min(abs(self.inner), abs(self.outer))


@dataclass(frozen=True)
class _Fine:
    """A fine angle: the image there, and how far any angle since the one before is from the nearer of the two."""

    angle: float
    image: Tensor
    gap: float


def cells(image: Tensor, reach: float, limit: float = 180.0) -> Iterator[Cell]:
    """Yield cells of at most `reach` in l2 that cover the angles up to `limit` degrees either way, by their `near`.

    Args:
        image: [C, H, W].

    Raises:
        UserError: the reach is less than the rounding of the pixels.

    Example:
        >>> found = list(cells(torch.rand(3, 6, 6), 0.5, 10.0))
        >>> found[0].centre, found[0].near, all(cell.distance <= 0.5 for cell in found)
        (0.0, 0.0, True)
    """
    slack = rounding(image)
    if not reach > 2.0 * slack:
        raise UserError(f"a reach of {reach:g} is little beside the rounding of pixels, {slack:.2g}: raise sigma")
    whole = math.radians(limit)
    sides = [_Side(image, sign, reach - slack, whole) for sign in (1.0, -1.0)]
    ends = [side.extended(image.detach().double().cpu()) for side in sides]
    yield Cell(0.0, -math.degrees(ends[1][0]), math.degrees(ends[0][0]), max(end[1] for end in ends) + slack)
    waiting = [side.cell(slack) for side in sides]
    while any(cell is not None for cell in waiting):
        i = min((i for i in (0, 1) if waiting[i] is not None), key=lambda i: waiting[i].near)  # type: ignore[union-attr]
        cell = waiting[i]
        assert cell is not None
        yield cell
        waiting[i] = sides[i].cell(slack)


def rounding(image: Tensor) -> float:
    """Return how far in l2 the rounding of pixels to float32 may move an image and its rotations."""
    return math.sqrt(image.numel()) * _ROUNDING * max(1.0, float(image.abs().max()))


class _Side:
    """Goes outwards from 0 on one side; all angles here are absolute, in radians."""

    def __init__(self, image: Tensor, sign: float, reach: float, limit: float) -> None:
        self.image, self.sign, self.reach, self.limit = image.detach().double().cpu(), sign, reach, limit
        _, height, width = image.shape
        self.longest = _BOX / (0.5 * math.hypot(height - 1, width - 1) + 1.0)
        self.step = min(_FIRST, self.longest)
        self.last = _Fine(0.0, self.image, 0.0)
        self.ahead: _Fine | None = None

    def next(self) -> _Fine | None:
        """Return the fine angle after the last; None where the range ends."""
        if self.ahead is None and self.last.angle < self.limit:
            self.ahead = self._fine()
        return self.ahead

    def _fine(self) -> _Fine:
        start, wanted = self.last.angle, _FINE * self.reach
        while True:
            end = min(start + self.step, self.limit)
            steep = lipschitz(self.image, self.sign * start, self.sign * end)
            gap = 0.5 * steep * (end - start)
            if gap <= _STEEP * wanted:
                break
            self.step *= 0.5
        self.step = self.longest if steep == 0.0 else min(2.0 * wanted / steep, self.longest)
        return _Fine(end, rotate(self.image, self.sign * end), gap)

    def take(self) -> None:
        """Go on to the fine angle ahead."""
        assert self.ahead is not None
        self.last, self.ahead = self.ahead, None

    def extended(self, centre: Tensor, distance: float = 0.0) -> tuple[float, float]:
        """Go on while all angles are within reach of the image `centre`; return the last one and the distance."""
        here = _apart(self.last.image, centre)
        while (ahead := self.next()) is not None:
            there = _apart(ahead.image, centre)
            most = max(here, there) + ahead.gap
            if most > self.reach:
                break
            distance, here = max(distance, most), there
            self.take()
        return self.last.angle, distance

    def cell(self, slack: float) -> Cell | None:
        """Return the cell that begins where the one before ended; None where the range ends."""
        if self.next() is None:
            return None
        inner, passed, centre, distance = self.last.angle, [self.last], self.last, 0.0
        while (ahead := self.next()) is not None:
            most = _farthest([*passed, ahead], ahead.image)
            if most > self.reach:
                break
            centre, distance = ahead, most
            passed.append(ahead)
            self.take()
        outer, distance = self.extended(centre.image, distance)
        inner, outer, middle = (math.degrees(self.sign * angle) for angle in (inner, outer, centre.angle))
        return Cell(middle, inner, outer, distance + slack)


def _farthest(passed: list[_Fine], centre: Tensor) -> float:
    """Return how far any angle between fine ones is from the image `centre`, at most."""
    apart = [_apart(fine.image, centre) for fine in passed]
    return max(max(apart[k], apart[k + 1]) + passed[k + 1].gap for k in range(len(passed) - 1))


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm()) * (1.0 + 1e-12)

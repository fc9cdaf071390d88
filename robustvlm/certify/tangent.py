"""Tangent linearisation (T6): the distribution certificate as a mean test, so that sampling may stop at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from robustvlm.certify.bounds.betting import FRACTIONS, log_gains, mix
from robustvlm.certify.normal import Array, check_alpha, check_shift, check_sigma
from robustvlm.certify.scores import as_scores
from robustvlm.errors import UserError

CLIPS: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
"""Reference survival functions are clipped to [d, 1 - d]; tests average their wealth over these d."""


@dataclass(frozen=True, eq=False)
class Tangent:
    """`E g(x' + noise) >= constant + E Psi(g)` for all x' within the shift, Psi piecewise linear (T6).

    Attributes:
        knots: [m] from 0 to 1.
        psi: [m] values of Psi at the knots, from 0, non-decreasing.
        constant: C of the theorem.
    """

    knots: Array
    psi: Array
    constant: float

    def transform(self, scores: ArrayLike) -> Array:
        """Return `Psi(g) / Psi(1)` in [0, 1]; NaN scores count as 0."""
        return np.interp(as_scores(scores), self.knots, self.psi) / self.psi[-1]

    def null_mean(self, target: float) -> float:
        """Return m0 such that `E transform(g) > m0` certifies `E g(x' + noise) > target`; may be outside (0, 1)."""
        return float((target - self.constant) / self.psi[-1])

    def bound(self, scores: ArrayLike) -> float:
        """Return the plug-in value `C + mean Psi(g)`: at most the shifted mean of the empirical distribution."""
        return float(self.constant + self.psi[-1] * self.transform(scores).mean())


def tangent_at(pilot: ArrayLike, a: float, *, clip: float = 1e-3) -> Tangent:
    """Return the tangent at the survival function of an independent pilot sample [n0] in [0, 1] (T6).

    Any reference is sound (the shift is convex in the survival function); a good one is tight.

    Raises:
        UserError: `clip` is not in (0, 1/2).

    Example:
        >>> t = tangent_at([0.2] + [0.95] * 9, 0.5)
        >>> round(t.bound([0.2] + [0.95] * 9), 3)
        0.787
    """
    if not 0.0 < clip < 0.5:
        raise UserError(f"the clip of the reference survival function must lie in (0, 0.5), got {clip}")
    a = check_shift(a)
    reference = np.sort(as_scores(pilot))
    knots = np.unique(np.concatenate([[0.0], reference, [1.0]]))
    survival = 1.0 - np.searchsorted(reference, knots[1:], side="left") / len(reference)
    survival = np.clip(survival, clip, 1.0 - clip)
    quantile = ndtri(survival)
    slope = np.exp(a * quantile - 0.5 * a * a)
    width = np.diff(knots)
    constant = float(width @ (ndtr(quantile - a) - slope * survival))
    return Tangent(knots, np.append(0.0, np.cumsum(width * slope)), constant)


class TangentTest:
    """Anytime-valid test of `E g(x' + noise) > target` for all x' within `a` sigmas, with a pilot reference (T6).

    The wealths of the references in `CLIPS` are averaged (an average of test supermartingales is one). `certified` is
    permanent once reached. `hopeless` says that sampling on is pointless: every reference needs a mean of one or more,
    or the opposite bets have shown at level `futility` that its mean is too small. That costs power, never soundness.

    Example:
        >>> test = TangentTest([0.9, 0.92, 0.94] * 50, a=0.5, target=0.75, alpha=0.001)
        >>> for _ in range(5):
        ...     test.update([0.91, 0.93] * 32)
        >>> test.certified, test.hopeless
        (True, False)
    """

    def __init__(self, pilot: ArrayLike, *, a: float, target: float, alpha: float, futility: float = 0.01) -> None:
        self.level = log(1.0 / check_alpha(alpha))
        self.doubt_level = log(1.0 / check_alpha(futility))
        tangents = [tangent_at(pilot, a, clip=clip) for clip in CLIPS]
        nulls = [max(t.null_mean(target), 1e-6) for t in tangents]
        self._bets = [(t, m0) for t, m0 in zip(tangents, nulls, strict=True) if m0 < 1.0 - 1e-9]
        self._gains = np.zeros((len(CLIPS), len(FRACTIONS)))  # a reference without a bet keeps wealth one
        self._doubts = np.zeros((len(self._bets), len(FRACTIONS)))
        self.hopeless = not self._bets
        self.certified = False
        self.n = 0

    @property
    def log_wealth(self) -> float:
        """The current log of the averaged wealth."""
        return float(mix(self._gains.ravel()))

    def update(self, scores: ArrayLike) -> None:
        """Add estimation scores [n], disjoint from the pilot; an empty batch changes nothing."""
        x = np.asarray(scores, dtype=np.float64)
        if len(x) == 0:
            return
        for row, (reference, m0) in enumerate(self._bets):
            moved = reference.transform(x)
            self._gains[row] += log_gains(moved, m0)
            self._doubts[row] += log_gains(1.0 - moved, 1.0 - m0)
        self.n += len(x)
        self.certified = self.certified or self.log_wealth >= self.level
        if not self.certified and self._bets:
            self.hopeless = self.hopeless or bool((mix(self._doubts) >= self.doubt_level).all())


def tangent_radius(
    pilot: ArrayLike, scores: ArrayLike, *, target: float, sigma: float, alpha: float, grid: Sequence[float]
) -> float:
    """Return the radius certified by testing an increasing grid of shifts in turn, each at `alpha` (T6).

    The nulls are nested and testing stops at the first failure, so no correction is needed (fixed sequence).

    Args:
        pilot: [n0] scores for the references only.
        scores: [n] estimation scores.
        grid: increasing shifts eps / sigma, fixed before the data.

    Raises:
        UserError: the grid is empty, negative or not increasing.

    Example:
        >>> tangent_radius([0.9] * 200, [0.9] * 800, target=0.75, sigma=1.0, alpha=0.001, grid=[0.5, 1.0, 1.5, 2.0])
        1.0
    """
    shifts = np.asarray(grid, dtype=np.float64)
    if shifts.ndim != 1 or len(shifts) == 0 or shifts[0] < 0.0 or (np.diff(shifts) <= 0.0).any():
        raise UserError("the grid of shifts must be increasing numbers >= 0, fixed before the data")
    reached = 0.0
    for a in shifts:
        test = TangentTest(pilot, a=float(a), target=target, alpha=alpha)
        test.update(scores)
        if not test.certified:
            break
        reached = float(a)
    return check_sigma(sigma) * reached

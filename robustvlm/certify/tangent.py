"""Tangent linearisation (T6): the distribution certificate as a mean test, so that sampling may stop at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from robustvlm.certify.certifier import as_scores
from robustvlm.certify.means import FRACTIONS, log_gains, mix
from robustvlm.certify.normal import Array, check_alpha, check_shift
from robustvlm.errors import UserError

CLIPS: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4)
"""Reference survival functions are clipped to [d, 1 - d]; tests average their wealth over these d."""


@dataclass(frozen=True, eq=False)
class Tangent:
    """`E g(x' + noise) >= constant + E Psi(g)` for all x' within the shift, Psi piecewise linear (T6).

    For C references (clips) and K scores at once; a single score has K = 1.

    Attributes:
        knots: [m, K] from 0 to 1, non-decreasing along axis 0.
        slope: [C, m-1] of Psi between the knots (it depends on the rank only, not on the score).
        psi: [C, m, K] values of Psi at the knots, from 0.
        constant: [C, K], C of the theorem.
    """

    knots: Array
    slope: Array
    psi: Array
    constant: Array

    def transform(self, scores: ArrayLike) -> Array:
        """Return `Psi(g) / Psi(1)` in [0, 1], [C, n, K], for scores [n] or [n, K]; NaN scores count as 0."""
        x = as_scores(scores).reshape(-1, self.knots.shape[1])
        cells = [np.searchsorted(knots[1:-1], column) for knots, column in zip(self.knots.T, x.T, strict=True)]
        cell = np.stack(cells, axis=1)
        column = np.arange(x.shape[1])
        value = self.psi[:, cell, column] + self.slope[:, cell] * (x - self.knots[cell, column])
        return np.asarray(np.clip(value / self.psi[:, -1:], 0.0, 1.0))

    def null_mean(self, target: ArrayLike) -> Array:
        """Return m0 [C, K] such that `E transform(g) > m0` certifies `E g(x' + noise) > target`; may leave (0, 1).

        The target is one number, or one per score [K].
        """
        return np.asarray((np.asarray(target, dtype=np.float64) - self.constant) / self.psi[:, -1])

    def bound(self, scores: ArrayLike) -> Array:
        """Return the plug-in `C + mean Psi(g)`, [C, K]: at most the shifted mean of the empirical distribution."""
        return np.asarray(self.constant + self.psi[:, -1] * self.transform(scores).mean(axis=1))

    def keep(self, columns: NDArray[Any]) -> Tangent:
        """Return the tangents of a part of the K scores."""
        return Tangent(self.knots[:, columns], self.slope, self.psi[..., columns], self.constant[:, columns])


def tangent_at(pilot: ArrayLike, a: float, *, clips: Sequence[float] = CLIPS) -> Tangent:
    """Return the tangents at the clipped survival function of an independent pilot sample [n0] or [n0, K] (T6).

    Any reference is sound (the shift is convex in the survival function); a good one is tight.

    Raises:
        UserError: a clip is not in (0, 1/2).

    Example:
        >>> t = tangent_at([0.2] + [0.95] * 9, 0.5, clips=[1e-3])
        >>> round(t.bound([0.2] + [0.95] * 9).item(), 3)
        0.787
    """
    clip = np.asarray(clips, dtype=np.float64)[:, None]
    if not ((clip > 0.0) & (clip < 0.5)).all():
        raise UserError(f"the clips of the reference survival function must lie in (0, 0.5), got {list(clips)}")
    a = check_shift(a)
    reference = np.sort(as_scores(pilot), axis=0)
    reference = reference.reshape(len(reference), -1)
    knots = np.pad(reference, ((1, 1), (0, 0)), constant_values=((0.0, 1.0), (0.0, 0.0)))
    survival = np.clip(np.arange(len(reference), -1, -1) / len(reference), clip, 1.0 - clip)  # on the cell below a knot
    quantile = ndtri(survival)
    slope = np.exp(a * quantile - 0.5 * a * a)
    width = np.diff(knots, axis=0)
    psi = np.cumsum(slope[:, :, None] * width, axis=1)
    return Tangent(knots, slope, np.pad(psi, ((0, 0), (1, 0), (0, 0))), (ndtr(quantile - a) - slope * survival) @ width)


class TangentTest:
    """Anytime-valid tests of `E g(x' + noise) > target` for all x' within `a` sigmas, with pilot references (T6).

    The wealths of the references in `CLIPS` are averaged (an average of test supermartingales is one). `certified` is
    permanent once reached. `hopeless` says that sampling on is pointless: every reference needs a mean of one or more,
    or the opposite bets have shown at level `futility` that its mean is too small. That costs power, never soundness.

    Args:
        pilot: [n0] or [n0, K] scores; one test per column.
        target: one for all tests, or [K].

    Attributes:
        certified, hopeless: [K] booleans.
        n: samples seen.

    Example:
        >>> test = TangentTest([0.9, 0.92, 0.94] * 50, a=0.5, target=0.75, alpha=0.001)
        >>> for _ in range(5):
        ...     test.update([0.91, 0.93] * 32)
        >>> test.certified.item(), test.hopeless.item()
        (True, False)
    """

    def __init__(self, pilot: ArrayLike, *, a: float, target: ArrayLike, alpha: float, futility: float = 0.01) -> None:
        self.level = log(1.0 / check_alpha(alpha))
        self.doubt_level = log(1.0 / check_alpha(futility))
        self.tangent = tangent_at(pilot, a)
        self._nulls = np.maximum(self.tangent.null_mean(target), 1e-6)
        self._gains = np.zeros((*self._nulls.shape, len(FRACTIONS)))
        self._doubts = np.zeros_like(self._gains)
        self.certified: NDArray[np.bool_] = np.zeros(self._nulls.shape[1], dtype=bool)
        self.hopeless: NDArray[np.bool_] = np.asarray(~self._possible.any(axis=0))
        self.n = 0

    @property
    def _possible(self) -> NDArray[np.bool_]:
        """[C, K] where a bet exists; a reference without one keeps wealth one."""
        return self._nulls < 1.0 - 1e-9

    @property
    def log_wealth(self) -> Array:
        """The current log of the averaged wealth, [K]."""
        return mix(np.moveaxis(self._gains, 1, 0).reshape(self._nulls.shape[1], -1))

    def update(self, scores: ArrayLike) -> None:
        """Add estimation scores [n] or [n, K], disjoint from the pilot; an empty batch changes nothing."""
        x = np.asarray(scores, dtype=np.float64)
        if len(x) == 0:
            return
        bets, nulls = self._possible, np.where(self._possible, self._nulls, 0.5)
        moved = np.moveaxis(self.tangent.transform(x), 1, 0)  # [n, C, K]
        self._gains += np.where(bets[..., None], log_gains(moved, nulls), 0.0)
        self._doubts += np.where(bets[..., None], log_gains(1.0 - moved, 1.0 - nulls), 0.0)
        self.n += len(x)
        self.certified |= self.log_wealth >= self.level
        doubted = (mix(self._doubts) >= self.doubt_level) | ~bets
        self.hopeless = (self.hopeless | doubted.all(axis=0)) & ~self.certified

    def keep(self, columns: NDArray[Any]) -> None:
        """Go on with a part of the K tests only."""
        self.tangent = self.tangent.keep(columns)
        self._nulls, self._gains, self._doubts = (x[:, columns] for x in (self._nulls, self._gains, self._doubts))
        self.certified, self.hopeless = self.certified[columns], self.hopeless[columns]

"""All directions at once: how far the smoothed feature moves along any of them, from the core of its features (T21)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from robustvlm.certify.certifier import unit_rows
from robustvlm.certify.means import clopper_pearson_upper, kl_upper_mean
from robustvlm.certify.normal import Array, check_alpha, largest_true, shift_up
from robustvlm.certify.shapes import A_MAX, hcr_drift
from robustvlm.core import N_MAX
from robustvlm.errors import UserError

# T21. Let c be a point of the unit ball and tau > 0, both chosen by the pilot, and g = f where |f - c| <= tau, else c.
# For every unit v, <f, v> >= <g, v> - (1 + <c, v>) 1[|f - c| > tau], and therefore at every x' within a sigmas
#
#     <m(x'), v> >= <E g, v> - drift(a) - (1 + <c, v>) Phi(Phi^-1(q) + a),     q >= P(|f - c| > tau)            (T0)
#
# The core g - c is at most tau long, so that E <g, v> moves by no more than both sqrt(lambda (e^(a^2) - 1)), lambda at
# least the top eigenvalue of E (g - c)(g - c)^T (T7), and 2 tau (2 Phi(a / 2) - 1) (T2 for a score in [-tau, tau]).
# Finally | mean of g - E g | <= sqrt(2 t L / n) + 2 tau L / n with probability 1 - delta, L = ln(2 / delta), where t is
# at least E |g - c|^2 (Pinelis 1994; in this form Smale and Zhou 2007, Lemma 1): free of the dimension.
#
# Four events, alpha / 4 each, none of which knows v: the bound holds for all v at once, however they are chosen.
# Without a core (T7 alone) a few features far away, which no sample excludes, enter by the root of their second moment;
# here they enter by their share.

REACH = 1.3
"""The core reaches so many times as far as the pilot sample that is furthest from its mean."""


@dataclass(frozen=True, eq=False)
class Core:
    """Bounds that hold at once, with probability 1 - alpha, for the part of the features near a point.

    Attributes:
        centre: [D], c. mean: [D], the sample mean of g. reach: tau.
        ball: bound of | mean - E g |. variance: of the top eigenvalue of E (g - c)(g - c)^T. outside: of the share q.
        n, spread, lost: samples, and of them the mean of |g - c|^2 and the share outside of the core.
    """

    centre: Array
    mean: Array
    reach: float
    ball: float
    variance: float
    outside: float
    n: int
    spread: float
    lost: float

    def lower(self, directions: Array, a: float) -> Array:
        """Return lower bounds [K] of `<m(x'), v>` for unit directions [K, D] and all x' within `a` sigmas."""
        drift = min(float(hcr_drift(self.variance, a)), 2.0 * self.reach * float(2.0 * ndtr(0.5 * a) - 1.0))
        lost = (1.0 + directions @ self.centre) * float(shift_up(self.outside, a))
        return np.asarray(directions @ self.mean - self.ball - drift - lost)

    def shift(self, directions: Array, *, least: float = 0.0) -> float:
        """Return the largest shift at which `<m(x'), v>` stays above `least` for all directions; or 0."""

        def holds(a: Array) -> bool:
            return bool((self.lower(directions, float(a)) > least).all())

        return float(largest_true(holds, 0.0, A_MAX)) if holds(np.float64(0.0)) else 0.0


def core_of(pilot: ArrayLike, estimation: ArrayLike, alpha: float) -> Core:
    """Return the bounds from unit features: a pilot [n0, D] that chooses the core, and others [n, D] (T21).

    A failed row (NaN) lies outside of the core.

    Raises:
        UserError: the pilot has no feature.

    Example:
        >>> rows = np.tile([[0.96, 0.28], [0.96, -0.28]], (1000, 1))
        >>> core = core_of(rows[:200], rows[200:], 0.001)
        >>> round(core.shift(np.array([[1.0, 0.0]])), 2), round(core.shift(np.array([[0.8, -0.6]])), 2)
        (1.87, 1.66)
    """
    first, rows, part = unit_rows(pilot), unit_rows(estimation), 0.25 * check_alpha(alpha)
    kept = first[np.isfinite(first).all(axis=1)]
    if not len(kept):
        raise UserError("every pilot sample failed: there is no point to look around")
    centre, n = kept.mean(axis=0), len(rows)
    reach = min(2.0, max(REACH * float(np.linalg.norm(kept - centre, axis=1).max()), 1e-6))
    away = rows - centre
    square = np.nan_to_num((away**2).sum(axis=1), nan=np.inf)
    inside = square <= reach * reach
    core = np.where(inside[:, None], away, 0.0) / reach  # at most one long, so that its moments lie in [0, 1]
    gram = core.T @ core if core.shape[1] <= n else core @ core.T
    top = float(np.linalg.eigvalsh(gram / n)[-1])
    variance = float(kl_upper_mean(min(max(top, 0.0), 1.0), n, part))
    spread, lost = float((core**2).sum(axis=1).mean()), n - int(inside.sum())
    upper = float(kl_upper_mean(spread, n, part))
    level = log(2.0 / part)
    return Core(
        centre=centre,
        mean=centre + reach * core.mean(axis=0),
        reach=reach,
        ball=reach * (sqrt(2.0 * upper * level / n) + 2.0 * level / n),
        variance=reach * reach * variance,
        outside=float(clopper_pearson_upper(lost, n, part)),
        n=n,
        spread=reach * reach * spread,
        lost=lost / n,
    )


def best_core_shift(n: int, alpha: float) -> float:
    """Return a shift that n samples cannot certify beyond: where all that may lie outside has reached one half.

    Example:
        >>> round(best_core_shift(800, 0.001), 2)
        2.31
    """
    share = float(clopper_pearson_upper(0, max(1, n), 0.25 * check_alpha(alpha)))
    return max(0.0, -float(ndtri(share)))


def copies_needed(core: Core, directions: Array, alpha: float) -> int | None:
    """Return about how many samples would certify some radius if all were like those of a core; None if none would.

    An estimate and no bound: what the samples had stands for what the noise has.

    Example:
        >>> rows, v = np.tile([[0.96, 0.28], [0.96, -0.28]], (30, 1)), np.array([[0.3, 0.9539]])
        >>> few = core_of(rows[:30], rows[30:], 0.001)
        >>> few.shift(v), copies_needed(few, v, 0.001)
        (0.0, 100)
    """
    margins, ones, part = directions @ core.mean, 1.0 + directions @ core.centre, 0.25 * check_alpha(alpha)
    level = log(2.0 / part)

    def enough(count: int) -> bool:
        ball = sqrt(2.0 * core.spread * level / count) + 2.0 * core.reach * level / count
        outside = float(clopper_pearson_upper(round(core.lost * count), count, part))
        return bool((margins > ball + ones * outside).all())

    if not (margins > core.lost * ones).all():
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > N_MAX:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

"""Grid-mixture betting: an anytime-valid, order-invariant test and lower bound for the mean of [0, 1] variables."""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from robustvlm.certify.normal import Array, check_alpha, largest_true
from robustvlm.certify.scores import as_scores
from robustvlm.errors import UserError

FRACTIONS: tuple[float, ...] = tuple(np.geomspace(0.02, 0.98, 8).tolist())


def log_gains(scores: ArrayLike, m0: ArrayLike) -> Array:
    """Return [..., 8]: per bet `lam_j = F_j / m0`, the summed log wealth `sum_i log(1 + lam_j (x_i - m0))`.

    Args:
        scores: [n, ...] in [0, 1], samples along axis 0.
        m0: null means in (0, 1), broadcast against `scores[0]`.

    Under `E[x_i | past] <= m0` each wealth is a supermartingale started at one; sums over disjoint samples add up, in
    any order. Source: Waudby-Smith and Ramdas (JRSSB 2024), with constant bets mixed over a grid.

    Example:
        >>> log_gains([0.9, 0.9], 0.5).shape
        (8,)
    """
    return _gains(as_scores(scores), np.asarray(m0, dtype=np.float64))


def _gains(x: Array, m0: Array) -> Array:
    odds = x / m0 - 1.0
    return np.stack([np.log1p(fraction * odds).sum(axis=0) for fraction in FRACTIONS], axis=-1)


def mix(gains: ArrayLike) -> Array:
    """Return the log of the mean wealth over the last axis (the mean of supermartingales is one).

    Example:
        >>> round(float(mix([0.0, 0.0])), 12)
        0.0
    """
    gains = np.asarray(gains, dtype=np.float64)
    return np.asarray(logsumexp(gains, axis=-1) - log(gains.shape[-1]))


def betting_lower(scores: ArrayLike, alpha: float, *, steps: int = 30) -> Array:
    """Return the betting lower bound of the mean of scores [n, ...]: the largest null mean that is rejected.

    The log wealth decreases in the null mean, so bisection finds the end; the rejected side is returned. Valid at any
    data-dependent n, hence the running maximum over looks is valid as well.

    Example:
        >>> round(float(betting_lower([0.9, 0.7, 1.0, 0.8] * 250, 0.001)), 5)
        0.83519
        >>> float(betting_lower([0.0, 0.0], 0.05))
        0.0
    """
    x = as_scores(scores)
    level = log(1.0 / check_alpha(alpha))
    top = np.full(x.shape[1:], x.max(axis=0))  # no null above every sample is ever rejected
    with np.errstate(divide="ignore", invalid="ignore"):  # a zero null mean only occurs where all scores are zero
        return largest_true(lambda m0: mix(_gains(x, m0)) >= level, np.zeros(x.shape[1:]), top, steps=steps)


class BettingState:
    """The wealth against `E x <= m0`, batch by batch: looking at it after every batch is allowed (Ville).

    The wealth does not depend on the order or the batching of the samples. `m0` may be an array: one test per element,
    samples then have shape [n, *m0.shape]. `rejected` is permanent: a level once reached stays reached.

    Raises:
        UserError: a null mean is outside (0, 1).

    Example:
        >>> state = BettingState(0.5)
        >>> for _ in range(4):
        ...     state.update([0.9] * 10)
        >>> state.n, bool(state.rejected(0.001))
        (40, True)
    """

    def __init__(self, m0: ArrayLike) -> None:
        self.m0 = np.array(m0, dtype=np.float64)
        if not ((self.m0 > 0.0) & (self.m0 < 1.0)).all():
            raise UserError(f"a null mean must lie strictly between 0 and 1, got {self.m0.tolist()}")
        self.n = 0
        self.gains = np.zeros((*self.m0.shape, len(FRACTIONS)))
        self.peak = np.zeros(self.m0.shape)

    @property
    def log_wealth(self) -> Array:
        """The current log wealth, shape of `m0`; 0 before the first sample."""
        return mix(self.gains)

    def update(self, scores: ArrayLike) -> None:
        """Add scores [n, *m0.shape]; an empty batch changes nothing."""
        x = np.asarray(scores, dtype=np.float64)
        if len(x) == 0:
            return
        self.gains = self.gains + log_gains(x, self.m0)
        self.n += len(x)
        self.peak = np.maximum(self.peak, self.log_wealth)

    def merge(self, other: BettingState) -> None:
        """Add the samples of another state with the same null means (another rank's share of the same stream)."""
        if not np.array_equal(self.m0, other.m0):
            raise UserError("only states that test the same null means can be merged")
        self.gains = self.gains + other.gains
        self.n += other.n
        self.peak = np.maximum(self.peak, self.log_wealth)

    def rejected(self, alpha: float) -> np.ndarray:
        """Return where `E x > m0` is certified: the wealth was at least `1 / alpha` at some look."""
        return np.asarray(self.peak >= log(1.0 / check_alpha(alpha)))

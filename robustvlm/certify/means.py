"""Confidence bounds for the mean of [0, 1] variables: for a number of samples fixed beforehand, or at any time."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp, rel_entr

from robustvlm.certify.certifier import as_scores
from robustvlm.certify.normal import Array, beta_quantile, check_alpha, largest_true
from robustvlm.errors import UserError, nearest

# Confidence bounds for the mean of [0, 1] variables when the number of samples was fixed beforehand


def hoeffding_lower(scores: ArrayLike, alpha: float) -> Array:
    """Return Hoeffding's lower bound `mean - sqrt(ln(1/alpha) / 2n)` for scores [n, ...] along axis 0 (JASA 1963).

    Example:
        >>> round(float(hoeffding_lower([0.9] * 10_000, 0.001)), 6)
        0.881415
    """
    x = as_scores(scores)
    return np.maximum(0.0, x.mean(axis=0) - sqrt(log(1.0 / check_alpha(alpha)) / (2 * len(x))))


def bernstein_lower(scores: ArrayLike, alpha: float) -> Array:
    """Return the empirical Bernstein lower bound for scores [n, ...], n >= 2 (Maurer and Pontil 2009, Theorem 4).

    Raises:
        UserError: there are fewer than two samples, so that there is no sample variance.

    Example:
        >>> round(float(bernstein_lower([0.9, 0.7, 1.0, 0.8] * 250, 0.001)), 6)
        0.818455
    """
    x = as_scores(scores)
    n = len(x)
    if n < 2:
        raise UserError("the empirical Bernstein bound needs at least 2 samples, got 1")
    level = log(2.0 / check_alpha(alpha))
    spread = np.sqrt(2.0 * x.var(axis=0, ddof=1) * level / n)
    return np.maximum(0.0, x.mean(axis=0) - spread - 7.0 * level / (3.0 * (n - 1)))


def clopper_pearson_lower(successes: ArrayLike, n: int, alpha: float) -> Array:
    """Return the exact one-sided lower bound of a success probability (Clopper and Pearson 1934); 0/1 data only.

    Raises:
        UserError: the successes are not whole numbers between 0 and `n`.

    Example:
        >>> round(float(clopper_pearson_lower(9_900, 10_000, 0.001)), 6)
        0.986531
    """
    k = np.asarray(successes)
    if n < 1 or (k != np.floor(k)).any() or k.min() < 0 or k.max() > n:
        raise UserError(f"expected whole numbers of successes between 0 and n = {n}, got {k.tolist()}")
    inner = beta_quantile(check_alpha(alpha), np.maximum(k, 1), n - k + 1.0)
    return np.asarray(np.where(k == 0, 0.0, inner), dtype=np.float64)


def clopper_pearson_upper(successes: ArrayLike, n: int, alpha: float) -> Array:
    """Return the exact one-sided upper bound of a success probability; 0/1 data only.

    Example:
        >>> round(float(clopper_pearson_upper(0, 100, 0.05)), 6)
        0.029513
    """
    return 1.0 - clopper_pearson_lower(n - np.asarray(successes), n, alpha)


def divergence(p: ArrayLike, q: ArrayLike) -> Array:
    """Return the Bernoulli relative entropy `KL(p || q)` in nats, elementwise.

    Example:
        >>> round(float(divergence(0.5, 0.25)), 6)
        0.143841
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    return np.asarray(rel_entr(p, q) + rel_entr(1.0 - p, 1.0 - q))


def kl_lower_mean(mean: ArrayLike, n: int, alpha: float) -> Array:
    """Return the Chernoff lower bound: the largest `q <= mean` still excluded by `n KL(mean || q) >= ln(1/alpha)`.

    Valid for every law on [0, 1] (Hoeffding 1963, Theorem 1). For a mean over samples use `kl_lower`.

    Example:
        >>> round(float(kl_lower_mean(0.9, 10_000, 0.001)), 6)
        0.888482
    """
    m = np.clip(np.asarray(mean, dtype=np.float64), 0.0, 1.0)
    level = log(1.0 / check_alpha(alpha)) / n
    return largest_true(lambda q: divergence(m, q) >= level, np.zeros_like(m), m, steps=52)


def kl_upper_mean(mean: ArrayLike, n: int, alpha: float) -> Array:
    """Return the Chernoff upper bound of a mean of [0, 1] variables.

    Example:
        >>> round(float(kl_upper_mean(0.02, 10_000, 0.001)), 6)
        0.025653
    """
    return 1.0 - kl_lower_mean(1.0 - np.asarray(mean, dtype=np.float64), n, alpha)


def kl_lower(scores: ArrayLike, alpha: float) -> Array:
    """Return `kl_lower_mean` of scores [n, ...] along axis 0.

    Example:
        >>> round(float(kl_lower([0.9] * 10_000, 0.001)), 6)
        0.888482
    """
    x = as_scores(scores)
    return kl_lower_mean(x.mean(axis=0), len(x), alpha)


def upper(lower: Callable[[Array, float], Array], scores: ArrayLike, alpha: float) -> Array:
    """Return the upper bound `1 - lower(1 - scores)` that belongs to a lower bound.

    Example:
        >>> round(float(upper(hoeffding_lower, [0.1] * 10_000, 0.001)), 6)
        0.118585
    """
    return 1.0 - lower(1.0 - np.asarray(scores, dtype=np.float64), alpha)


# Grid-mixture betting: an anytime-valid, order-invariant test and lower bound for the mean of [0, 1] variables

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


# Certify `E x > m0` as soon as the samples allow it, give up as soon as they show that it will not happen

Decision = Literal["open", "certified", "futile"]


class SequentialTest:
    """One-sided anytime-valid test of `E x > m0` with a futility stop.

    The certifying wealth is at level `alpha`. The futility wealth (the same bets on `1 - x` against `1 - m0`, at level
    `futility`) can only stop the sampling early and abstain: it costs power, never soundness. A null mean of at least
    one is impossible and futile at once; one of at most zero is replaced by 1e-6, a stronger claim.

    Example:
        >>> test = SequentialTest(0.7, alpha=0.001)
        >>> while test.decision == "open":
        ...     decision = test.update([0.95, 0.85] * 8)
        >>> decision, test.n
        ('certified', 48)
    """

    def __init__(self, m0: float, *, alpha: float, futility: float | None = 0.01) -> None:
        self.m0 = max(float(m0), 1e-6)
        self.alpha = check_alpha(alpha)
        self.futility = None if futility is None else check_alpha(futility)
        self.n = 0
        self.decision: Decision = "open" if self.m0 < 1.0 - 1e-12 else "futile"
        if self.decision == "open":
            self._wins = BettingState(self.m0)
            self._loses = BettingState(1.0 - self.m0)

    def update(self, scores: ArrayLike) -> Decision:
        """Add scores [n] and return the decision, which is final once it is not "open"."""
        if self.decision != "open":
            return self.decision
        x = np.asarray(scores, dtype=np.float64)
        self._wins.update(x)
        self._loses.update(1.0 - np.nan_to_num(x, nan=0.0))
        self.n = self._wins.n
        if self._wins.rejected(self.alpha):
            self.decision = "certified"
        elif self.futility is not None and self._loses.rejected(self.futility):
            self.decision = "futile"
        return self.decision


# A sample whose size is decided before the first value: fixed-n bounds cannot be peeked at

LOWER_BOUNDS: dict[str, Callable[[Array, float], Array]] = {
    "hoeffding": hoeffding_lower,
    "bernstein": bernstein_lower,
    "kl": kl_lower,
    "betting": betting_lower,
}
ANYTIME_BOUNDS = frozenset({"betting"})
"""Bounds that stay valid when they are looked at after every batch; all others need their n fixed beforehand."""


def mean_lower(scores: ArrayLike, alpha: float, *, bound: str = "betting") -> Array:
    """Return the named level-`alpha` lower bound of the mean of scores [n, ...] along axis 0.

    Raises:
        UserError: the bound has another name than hoeffding, bernstein, kl or betting.

    Example:
        >>> round(float(mean_lower([0.9] * 100, 0.001)), 3)
        0.821
    """
    if bound not in LOWER_BOUNDS:
        raise UserError(f"there is no confidence bound '{bound}': {nearest(bound, LOWER_BOUNDS)}")
    return LOWER_BOUNDS[bound](as_scores(scores), alpha)

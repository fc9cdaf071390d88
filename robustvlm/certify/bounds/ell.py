"""Equal-local-levels (Berk-Jones type) calibration: the exact crossing probability of the order-statistics band."""

from __future__ import annotations

from math import exp, log

import numpy as np
from scipy.special import gammaln

from robustvlm.certify.normal import Array, beta_quantile, check_alpha
from robustvlm.errors import UserError

_NEGLIGIBLE = 1e-22  # terms dropped below this size only make the crossing probability larger


def order_quantiles(n: int, eta: float) -> Array:
    """Return `b_j = BetaQuantile(eta; j, n - j + 1)`, j = 1..n: each uniform order statistic is below with prob eta.

    Example:
        >>> [round(float(b), 4) for b in order_quantiles(2, 0.05)]
        [0.0253, 0.2236]
    """
    ranks = np.arange(1.0, n + 1.0)
    return beta_quantile(eta, ranks, n - ranks + 1.0)


def crossing_prob(n: int, eta: float) -> float:
    """Return P(some of n uniform order statistics lies below its `order_quantiles(n, eta)`), exactly.

    The empirical count at the boundary points is followed as a Poisson process conditioned to end at n (only positive
    terms are added, so nothing cancels); it crosses when at least j points lie below b_j. Source: the one-sided case of
    Moscovich and Nadler, Stat. Probab. Lett. 2017.

    Example:
        >>> round(crossing_prob(1, 0.05), 12)
        0.05
        >>> round(crossing_prob(1000, 1.4314e-5), 6)
        0.001
    """
    bounds = order_quantiles(n, eta)
    rates = n * np.diff(bounds, prepend=0.0, append=1.0)
    mass, first = np.ones(1), 0  # mass[k]: P(count = first + k, no crossing yet)
    for j, kernel in enumerate(_poisson_kernels(rates[:n])):
        mass = np.convolve(mass, kernel)[: j + 1 - first]
        skip = int(np.argmax(mass > _NEGLIGIBLE))
        mass, first = mass[skip:], first + skip
    missing = n - np.arange(first, first + len(mass))
    last = -rates[n] + missing * log(rates[n]) - gammaln(missing + 1.0)
    total = -n + n * log(n) - gammaln(n + 1.0)
    return float(1.0 - mass @ np.exp(last - total))


def _poisson_kernels(rates: Array) -> list[Array]:
    """Poisson probabilities for each rate, cut where they become negligible."""
    counts = np.arange(int(np.max(rates) + 12.0 * np.sqrt(np.max(rates)) + 40.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = counts * np.log(rates[:, None])
    logs[:, 0] = 0.0
    table = np.exp(logs - rates[:, None] - gammaln(counts + 1.0))
    lengths = len(counts) - np.argmax(table[:, ::-1] > _NEGLIGIBLE, axis=1)
    return [row[:length] for row, length in zip(table, lengths, strict=True)]


def calibrate(n: int, alpha: float, *, tolerance: float = 1e-5) -> float:
    """Return the local level eta whose crossing probability is at most, and within `tolerance` of, `alpha`.

    The returned level is one whose crossing probability was computed and found to be at most alpha. Takes about eight
    evaluations of `crossing_prob` (2 s at n = 10,000).

    Raises:
        UserError: n is not positive or alpha not in (0, 1).

    Example:
        >>> round(calibrate(100, 0.05), 6)
        0.002461
    """
    if n < 1:
        raise UserError(f"a band needs at least one sample, got n = {n}")
    target = log(check_alpha(alpha)) - 0.5 * tolerance
    low, high = log(alpha / n), log(alpha)  # union bound below, a single crossing above: both are certain
    f_low = log(max(crossing_prob(n, exp(low)), 1e-300)) - target
    f_high = log(crossing_prob(n, exp(high))) - target
    while f_low < -0.5 * tolerance and high - low > 1e-9:
        share = f_low / (f_low - f_high)  # log against log the curve is nearly straight
        middle = low + (high - low) * min(max(share, 1e-3), 1.0 - 1e-3)
        f_middle = log(max(crossing_prob(n, exp(middle)), 1e-300)) - target
        if f_middle <= 0.4 * tolerance:
            low, f_low = middle, f_middle
        else:
            high, f_high = middle, f_middle
    return exp(low)

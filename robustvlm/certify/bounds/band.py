"""Simultaneous lower bounds for the survival function at the order statistics of a sample of known size."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from robustvlm.certify.bounds.ell import order_quantiles
from robustvlm.certify.bounds.store import local_level
from robustvlm.certify.normal import Array, beta_quantile, check_alpha
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class Band:
    """Numbers `lower[i]` with `lower[i] <= P(g >= g_(i+1))` for all i at once, with probability at least 1 - alpha.

    `g_(1) <= ... <= g_(n)` are the sorted scores. The band depends on n and alpha only: it is made before the data,
    and the functions that use it refuse a sample of another size.
    """

    lower: Array
    alpha: float
    name: str

    @property
    def n(self) -> int:
        """The number of samples the band was made for."""
        return len(self.lower)


def _check_n(n: int) -> int:
    if n < 1:
        raise UserError(f"a band needs at least one sample, got n = {n}")
    return int(n)


def dkw_band(n: int, alpha: float) -> Band:
    """Return the one-sided Dvoretzky-Kiefer-Wolfowitz band (Massart 1990; needs alpha <= 1/2).

    Raises:
        UserError: alpha is above 1/2, where the one-sided inequality does not hold.

    Example:
        >>> round(float(dkw_band(10_000, 0.001).lower[0]), 6)
        0.981415
    """
    if check_alpha(alpha) > 0.5:
        raise UserError(f"the one-sided DKW band needs alpha <= 0.5, got {alpha}")
    survival = np.arange(_check_n(n), 0, -1) / n
    return Band(np.maximum(0.0, survival - sqrt(log(1.0 / alpha) / (2 * n))), alpha, "dkw")


def index_band(n: int, alpha: float, *, points: int = 128) -> Band:
    """Return a band without calibration: exact binomial bounds at a few order statistics, each at `alpha / points`.

    Between the chosen ranks the bound of the next higher rank is used, because the survival function decreases. The
    union bound over the fixed ranks makes it valid for every n; it is the fallback when n is too large to calibrate.

    Example:
        >>> round(float(index_band(10_000, 0.001).lower[0]), 5)
        0.99884
    """
    half = np.geomspace(1, max(1, _check_n(n) // 2), max(1, points // 2))
    ranks = np.unique(np.concatenate([np.floor(half), n + 1 - np.floor(half)]).astype(np.int64))
    values = beta_quantile(check_alpha(alpha) / len(ranks), n - ranks + 1.0, ranks)
    following = np.searchsorted(ranks, np.arange(1, n + 1))  # the first chosen rank that is not below i
    return Band(np.asarray(values[following]), alpha, "index")


def ell_band(n: int, alpha: float) -> Band:
    """Return the equal-local-levels (Berk-Jones) band, or `index_band` when `n` is too large to calibrate.

    Every order statistic gets the same local level, calibrated so that the chance of any crossing is alpha exactly
    for continuous scores and smaller otherwise. Narrow in the tails, where a Gaussian shift looks.

    Example:
        >>> band = ell_band(10_000, 0.001)
        >>> band.name, round(float(band.lower[0]), 5)
        ('ell', 0.99884)
    """
    level = local_level(_check_n(n), check_alpha(alpha))
    if level is None:
        return index_band(n, alpha)
    return Band(order_quantiles(n, level)[::-1], alpha, "ell")

"""Confidence bounds for the mean of [0, 1] variables when the number of samples was fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr

from robustvlm.certify.normal import Array, beta_quantile, check_alpha, largest_true
from robustvlm.certify.scores import as_scores
from robustvlm.errors import UserError


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

"""What settings can give at best: the radius that scores without any spread would earn, and the samples it takes."""

from collections.abc import Callable
from math import log

import numpy as np
from scipy.special import ndtri

from robustvlm.certify.bands import shipped_levels
from robustvlm.certify.means import FRACTIONS, clopper_pearson_lower, mix
from robustvlm.certify.normal import Array, check_alpha, check_sigma, largest_true
from robustvlm.certify.shapes import A_MAX
from robustvlm.certify.tangent import tangent_at
from robustvlm.certify.threats import find_threat
from robustvlm.core import N_MAX


def best_mean(n: int, alpha: float) -> float:
    """Return the betting lower bound of n scores that are all one, without making them.

    Example:
        >>> round(best_mean(10_000, 0.001), 5)
        0.99909
    """
    level = log(1.0 / check_alpha(alpha))

    def rejected(m0: Array) -> bool:
        return bool(mix(n * np.log1p(np.array(FRACTIONS) * (1.0 / float(m0) - 1.0))) >= level)

    return float(largest_true(rejected, 0.0, 1.0))


def best_class_radius(n: int, alpha: float, sigma: float, *, target: float = 0.5) -> float:
    """Return the class radius (P1-CDF) at best, set by the band at the lowest order statistic.

    `target` is the mean score to certify, 1/2 for a class.

    An estimate (local level alpha / 100, a few per cent off) where n and alpha are not in the shipped table.

    Example:
        >>> round(best_class_radius(9_000, 0.001, 0.25), 3)
        0.753
    """
    level = shipped_levels().get(f"{n}:{alpha!r}", check_alpha(alpha) / 100.0)
    return sigma * max(0.0, float(ndtri(level ** (1.0 / n)) - ndtri(target)))


def best_vote_radius(n: int, alpha: float, sigma: float, *, threat: str | None = None) -> float:
    """Return the hard-vote radius of a unanimous vote.

    Example:
        >>> round(best_vote_radius(9_000, 0.001, 0.25), 3)
        0.792
    """
    return find_threat(threat).reach(float(clopper_pearson_lower(n, n, alpha)), 0.5, sigma)


def samples_needed(best: Callable[[int], float], radius: float) -> int | None:
    """Return the least n with `best(n) >= radius`, or None if even ten million samples do not reach it.

    Args:
        best: one of the functions above with all but n fixed; non-decreasing in n.

    Example:
        >>> samples_needed(lambda n: best_vote_radius(n, 0.001, 0.25), 0.5)
        301
    """
    low, high = 1, 2
    while not best(high) >= radius:
        low, high = high, 2 * high
        if high > N_MAX:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if best(middle) >= radius else (middle, high)
    return high


def best_tangent_radius(n: int, alpha: float, sigma: float, *, target: float = 0.5) -> float:
    """Return the largest radius that an anytime-valid distribution test (T6) decides with n scores that are all one.

    Args:
        target: mean score to certify; 1/2 for a class, `(1 + tau / ||v||) / 2` for an open-set decision.

    Example:
        >>> round(best_tangent_radius(10_000, 0.001, 0.25), 3)
        0.769
    """
    level = log(1.0 / check_alpha(alpha))
    fractions = np.array(FRACTIONS)

    def certified(a: Array) -> bool:
        tangent = tangent_at(np.ones(2), float(a))
        nulls = np.maximum(tangent.null_mean(target), 1e-6)
        gains = np.where(nulls < 1.0 - 1e-9, n * np.log1p(fractions * (1.0 / nulls - 1.0)), 0.0)
        return bool(mix(gains.reshape(-1)) >= level)

    return check_sigma(sigma) * float(largest_true(certified, 0.0, A_MAX, steps=30))


def best_vote_test_radius(n: int, alpha: float, sigma: float, *, threat: str | None = None) -> float:
    """Return the largest radius that the betting test of a unanimous vote decides.

    Example:
        >>> round(best_vote_test_radius(10_000, 0.001, 0.25), 3)
        0.779
    """
    return find_threat(threat).reach(best_mean(n, alpha), 0.5, sigma)

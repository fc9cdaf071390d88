"""Gaussian shifts (T0), argument checks and a bisection that can only err on the safe side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv, ndtr, ndtri

from robustvlm.errors import BadSetting, UserError

Array = NDArray[np.float64]

_BELOW_ONE = float(np.nextafter(1.0, 0.0))


def shift_down(p: ArrayLike, a: ArrayLike) -> Array:
    """Return `Phi(Phi^-1(p) - a)`: the least a mean `p` of a [0, 1] function can become under a shift `a` (T0).

    Args:
        p: probabilities or means, clipped to [0, 1) so that a bound of exactly one cannot give an infinite radius.
        a: shift in units of sigma (eps / sigma), non-negative; broadcast against `p`.

    Example:
        >>> round(float(shift_down(0.96407, 0.6)), 6)
        0.884931
        >>> float(shift_down(1.0, 20.0)) < 1e-30
        True
    """
    return np.asarray(ndtr(ndtri(np.clip(np.asarray(p, dtype=np.float64), 0.0, _BELOW_ONE)) - a))


def shift_up(p: ArrayLike, a: ArrayLike) -> Array:
    """Return `Phi(Phi^-1(p) + a)`: the most a mean `p` of a [0, 1] function can become under a shift `a` (T0).

    Written as one minus the lower shift of `1 - p`, so that rounding and clipping push it upwards.

    Example:
        >>> round(float(shift_up(0.5, 1.0)), 6)
        0.841345
    """
    return 1.0 - shift_down(1.0 - np.asarray(p, dtype=np.float64), a)


def largest_true(ok: Callable[[Array], ArrayLike], low: ArrayLike, high: ArrayLike, *, steps: int = 40) -> Array:
    """Return, elementwise, a point where the decreasing predicate `ok` was seen to hold (or `low`), by bisection.

    The returned end is always the verified one: a numerical inaccuracy makes the result smaller, never larger.
    `ok(low)` is assumed to hold; `ok` gets an array of the broadcast shape of `low` and `high`.

    Example:
        >>> x = largest_true(lambda x: x * x <= 2.0, 0.0, 2.0)
        >>> bool(x * x <= 2.0), round(float(x), 6)
        (True, 1.414214)
    """
    lo, hi = (np.array(end, dtype=np.float64) for end in np.broadcast_arrays(low, high))
    for _ in range(steps):
        middle = 0.5 * (lo + hi)
        holds = np.asarray(ok(middle), dtype=bool)
        lo = np.where(holds, middle, lo)
        hi = np.where(holds, hi, middle)
    return lo


def beta_quantile(p: ArrayLike, first: ArrayLike, second: ArrayLike) -> Array:
    """Return the `p` quantile of Beta(first, second), elementwise, checked against the distribution function.

    Where the library's inverse came out too large (older versions lose digits in the tails), bisection replaces it.

    Example:
        >>> round(float(beta_quantile(0.001, 10_000.0, 1.0)), 6)
        0.999309
    """
    p, first, second = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (p, first, second)))
    found = np.asarray(betaincinv(first, second, p))

    def low_enough(x: Array) -> Array:
        return np.asarray(betainc(first, second, x) <= p * (1.0 + 1e-9))

    good = low_enough(found)
    if good.all():
        return found
    return np.where(good, found, largest_true(low_enough, np.zeros_like(found), np.ones_like(found), steps=60))


def check_alpha(alpha: float) -> float:
    """Return `alpha` if it is a usable error probability.

    Raises:
        UserError: `alpha` is not strictly between 0 and 1.

    Example:
        >>> check_alpha(0.001)
        0.001
    """
    if not 0.0 < alpha < 1.0:
        raise BadSetting("alpha", "must lie strictly between 0 and 1", got=f"{alpha}: pass for example 0.001")
    return float(alpha)


def check_sigma(sigma: float) -> float:
    """Return `sigma` if it is a usable noise level.

    Raises:
        UserError: `sigma` is not a positive finite number.

    Example:
        >>> check_sigma(0.25)
        0.25
    """
    if not (sigma > 0.0 and np.isfinite(sigma)):
        raise BadSetting("sigma", "must be a positive number", got=f"{sigma}: pass for example 0.25")
    return float(sigma)


def check_shift(a: float) -> float:
    """Return `a` (eps / sigma) if it is a finite number that is not negative.

    Raises:
        UserError: `a` is negative, infinite or NaN.

    Example:
        >>> check_shift(0.5)
        0.5
    """
    if not (a >= 0.0 and np.isfinite(a)):
        raise UserError(f"the shift eps / sigma must be a finite number >= 0, got {a}")
    return float(a)


def check_cos0(cos0: float) -> float:
    """Return `cos0` if it is a cosine that can be certified.

    Negative cosines are refused: a negative value of the inner-product bound says nothing about the cosine, because
    dividing by a norm below one makes a negative number smaller.

    Raises:
        UserError: `cos0` is outside [0, 1).

    Example:
        >>> check_cos0(0.5)
        0.5
    """
    if not 0.0 <= cos0 < 1.0:
        raise UserError(f"the cosine to certify must be at least 0 and below 1, got {cos0}: pass for example 0.5")
    return float(cos0)


def check_radius(radius: float) -> float:
    """Return a `radius` to certify if it is one.

    Raises:
        UserError: `radius` is not a positive finite number.

    Example:
        >>> check_radius(0.5)
        0.5
    """
    if not (radius > 0.0 and np.isfinite(radius)):
        raise UserError(f"the radius to certify must be a positive number, got {radius}")
    return float(radius)

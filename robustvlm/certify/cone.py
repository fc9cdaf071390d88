"""Norm bounds (T2) and the closed-form cone certificate for the angle to the smoothed clean feature (T3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.fcsb import VACUOUS, fcsb_inner
from robustvlm.certify.normal import Array, check_cos0, check_sigma, largest_true, shift_up


def norm_upper(norm: ArrayLike, a: ArrayLike) -> Array:
    """Return `N(a) >= ||m(x')||` from an upper bound `norm` of `||m(x)||`, at most one (T2).

    Example:
        >>> round(float(norm_upper(0.5, 0.5)), 5)
        0.7598
    """
    return np.minimum(1.0, 2.0 * shift_up(0.5 * (1.0 + np.asarray(norm, dtype=np.float64)), a) - 1.0)


def norm_lower(norm: ArrayLike, a: ArrayLike) -> Array:
    """Return a lower bound of `||m(x')||` from a lower bound `norm` of `||m(x)||`, at least zero (T2).

    Example:
        >>> round(float(norm_lower(0.7, 0.5)), 5)
        0.40834
    """
    return np.maximum(0.0, fcsb_inner(0.5 * (1.0 + np.asarray(norm, dtype=np.float64)), a))


def drift(a: ArrayLike) -> Array:
    """Return `2 (2 Phi(a/2) - 1) >= ||m(x') - m(x)||` (T2).

    Example:
        >>> round(float(drift(0.5)), 5)
        0.39483
    """
    return 4.0 * shift_up(0.5, 0.5 * np.asarray(a, dtype=np.float64)) - 2.0


def side_upper(eta: ArrayLike, a: ArrayLike) -> Array:
    """Return `s(a) >= ||P m(x')||`, P the projection orthogonal to u, from an upper bound `eta` of `||P m(x)||` (T2).

    Example:
        >>> round(float(side_upper(0.0, 0.5)), 5)
        0.38292
    """
    return norm_upper(np.minimum(1.0, np.asarray(eta, dtype=np.float64)), a)


def join(p: ArrayLike, s: ArrayLike, norm: ArrayLike = 1.0) -> Array:
    """Return `p / min(1, norm, sqrt(p^2 + s^2))`, the certified cosine to u, or -1 where `p <= 0` (T3).

    Args:
        p: lower bound of `<m(x'), u>`.
        s: upper bound of `||P m(x')||`.
        norm: upper bound of `||m(x')||`.

    Example:
        >>> round(float(join(0.3, 0.4)), 6)
        0.6
    """
    p, s = np.asarray(p, dtype=np.float64), np.asarray(s, dtype=np.float64)
    length = np.minimum(np.minimum(1.0, norm), np.hypot(p, s))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0.0, np.minimum(1.0, p / length), VACUOUS)


def cone_cos(r: ArrayLike, a: ArrayLike, *, eta: ArrayLike = 0.0, norm: ArrayLike = 1.0) -> Array:
    """Return the certified `cos(m(x'), u)` given `<m(x), u> >= r` and `||P m(x)|| <= eta` (T3).

    Args:
        r: lower bound of `<m(x), u>`. For `u = m(x) / ||m(x)||` (eta = 0) a lower bound of `||m(x)||`; u need not be
            known then, and the claim is about the angle between the two smoothed features.
        a: eps / sigma.
        eta: upper bound of the part of m(x) orthogonal to u.
        norm: upper bound of `||m(x)||`.

    Example:
        >>> [round(float(c), 5) for c in cone_cos([0.7, 0.9], 0.5)]
        [0.72944, 0.89007]
    """
    p = fcsb_inner(0.5 * (1.0 + np.asarray(r, dtype=np.float64)), a)
    return join(p, side_upper(eta, a), norm_upper(norm, a))


def cone_radius(r: ArrayLike, cos0: float, sigma: float, *, eta: ArrayLike = 0.0, norm: ArrayLike = 1.0) -> Array:
    """Return the largest radius at which `cone_cos` is still at least `cos0` (and above zero); 0 means ABSTAIN (T3).

    Example:
        >>> [round(float(v), 3) for v in cone_radius([0.6, 0.9, 0.99], 0.5, 1.0)]
        [0.54, 1.093, 1.901]
    """
    check_cos0(cos0)
    r, eta, norm = np.broadcast_arrays(np.asarray(r, dtype=np.float64), eta, norm)

    def certified(a: Array) -> Array:
        cos = cone_cos(r, a, eta=eta, norm=norm)
        return np.asarray((cos >= cos0) & (cos > 0.0))

    return check_sigma(sigma) * largest_true(certified, np.zeros(r.shape), np.full(r.shape, 9.0))

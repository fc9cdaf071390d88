"""Vector Neyman-Pearson certificate (T4): the tight angle bound given a lower bound of the smoothed norm.

With the angle theta fixed, weak duality gives a sound certificate for *any* multipliers: the adversarial feature stays
within theta of u whenever `r > E ||(1 - s L sin(theta), s L cos(theta) - l)|| + eta |l|` for some s >= 0 and l, where
L is the likelihood ratio of the shift. (Divide the Lagrangian of the design by kappa and put s = 1/kappa.) The right
side is jointly convex in (s, l); its minimum is the least norm that certifies the angle.

The expectation is not estimated but bounded: the integrand is convex in L, so the chord between grid points lies above
it, and a chord integrates exactly. Neither the minimiser nor the quadrature can therefore make the claim too strong.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import ndtr

from robustvlm.certify.cone import cone_cos, cone_radius
from robustvlm.certify.normal import Array, check_cos0, check_shift, check_sigma, largest_true

MARGIN = 1e-9
"""Added to the least norm: covers rounding in the sums."""

A_MIN = 1e-4
"""Smaller shifts are judged as this one, where the cells of the likelihood ratio are still well apart."""

A_MAX = 5.0
"""Largest shift that is evaluated; a norm that certifies more is credited with this one."""


@lru_cache(maxsize=512)
def _chords(a: float, step: float = 0.005) -> tuple[Array, Array, float]:
    """Grid values of L, their weights, and the weight of the slope at infinity: E F(L) <= w @ F(L) + tail * slope."""
    a = max(a, A_MIN)
    t = np.arange(-6.5, 6.5 + a + step, step)
    likelihood = np.append(0.0, np.exp(a * t - 0.5 * a * a))
    plain = _cell_masses(t)
    tilted = _cell_masses(t - a)  # E[L; cell] is the cell's mass under the shifted normal
    width = np.diff(likelihood)
    weights = np.zeros(len(likelihood))
    weights[:-1] += np.maximum(0.0, likelihood[1:] * plain - tilted) / width
    weights[1:] += np.maximum(0.0, tilted - likelihood[:-1] * plain) / width
    beyond = float(ndtr(-t[-1]))
    weights[-1] += beyond
    return likelihood, weights, max(0.0, float(ndtr(a - t[-1])) - float(likelihood[-1]) * beyond)


def _cell_masses(t: Array) -> Array:
    """Standard normal masses of (-inf, t_0], (t_0, t_1], ..., computed in the smaller tail."""
    edges = np.append(-np.inf, t)
    left, right = edges[:-1], edges[1:]
    return np.asarray(np.where(left > 0.0, ndtr(-left) - ndtr(-right), ndtr(right) - ndtr(left)))


def dual_value(cos0: float, a: float, s: float, low: float, *, eta: float = 0.0) -> float:
    """Return an upper bound of `E ||(1 - s L sin, s L cos - l)|| + eta |l|` at any multipliers s >= 0 and l = `low`.

    A norm above this value certifies the angle arccos(cos0) at shift `a`, whatever the multipliers (weak duality).

    Example:
        >>> round(dual_value(0.5, 0.3, 0.0, 0.0), 12)
        1.0
    """
    return float(_dual(np.array([s, low]), check_cos0(cos0), check_shift(a), eta)[0])


def _dual(x: Array, cos0: float, a: float, eta: float) -> tuple[float, Array]:
    likelihood, weights, tail = _chords(a)
    sin0 = np.sqrt(1.0 - cos0 * cos0)
    along = 1.0 - x[0] * sin0 * likelihood
    across = x[0] * cos0 * likelihood - x[1]
    length = np.hypot(along, across)
    pull = weights / np.maximum(length, 1e-300)
    slope = np.array([pull @ ((across * cos0 - along * sin0) * likelihood) + tail, -(pull @ across) + eta])
    return float(weights @ length + tail * abs(x[0]) + eta * abs(x[1])), slope


@lru_cache(maxsize=65536)
def required_norm(cos0: float, a: float, *, eta: float = 0.0) -> float:
    """Return the least `r` such that `<m(x), u> >= r` certifies `cos(m(x'), u) > cos0` at shift `a`, rounded up (T4).

    Args:
        cos0: cosine to certify, in [0, 1).
        a: eps / sigma.
        eta: upper bound of the part of m(x) orthogonal to u; 0 for `u = m(x) / ||m(x)||`.

    A value of one or more means that no norm certifies it.

    Example:
        >>> [round(required_norm(0.5, a), 3) for a in (0.1, 0.5, 1.0, 2.0)]
        [0.092, 0.437, 0.749, 0.972]
    """
    check_cos0(cos0)
    a = check_shift(a)
    if a > A_MAX:
        return 1.0 + MARGIN
    sin0 = float(np.sqrt(1.0 - cos0 * cos0))
    start = np.array([np.exp(-0.5 * a * a) / sin0, cos0 / sin0])
    options = {"ftol": 1e-14, "gtol": 1e-10, "maxiter": 300}
    bounds = [(0.0, None), (0.0, None)]
    found = minimize(_dual, start, args=(cos0, a, eta), jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    value = _dual(found.x, cos0, a, eta)[0]
    return min(value if np.isfinite(value) else 1.0, 1.0) + MARGIN


def vector_radius(r: float, cos0: float, sigma: float, *, eta: float = 0.0) -> float:
    """Return the largest radius at which `cos(m(x'), u) > cos0` is certified by `<m(x), u> >= r`; 0 is ABSTAIN (T4).

    Where rounding or the range of shifts leaves the closed form (T3, same premise) ahead, that is returned. For the
    claim about the two smoothed features, `r` is a lower confidence bound of `||m(x)||` and eta is 0.

    Example:
        >>> [round(vector_radius(r, 0.5, 1.0), 3) for r in (0.5, 0.7, 0.9)]
        [0.583, 0.899, 1.461]
    """
    check_cos0(cos0)
    found = largest_true(lambda a: float(r) >= required_norm(cos0, float(a), eta=eta), 0.0, A_MAX, steps=24)
    return max(check_sigma(sigma) * float(found), float(cone_radius(r, cos0, sigma, eta=eta)))


def vector_cos(r: float, a: float, *, eta: float = 0.0) -> float:
    """Return the largest certified `cos(m(x'), u)` at shift `a` given `<m(x), u> >= r`, or -1 if below zero (T4, T3).

    Example:
        >>> [round(vector_cos(r, a), 4) for r, a in ((0.7, 0.5), (0.9, 0.5), (0.9, 1.0))]
        [0.8846, 0.9706, 0.8471]
    """
    closed = float(cone_cos(r, a, eta=eta))
    if not float(r) >= required_norm(0.0, a, eta=eta):
        return closed
    found = largest_true(lambda c: float(r) >= required_norm(float(c), a, eta=eta), 0.0, 1.0 - 1e-9, steps=26)
    return max(float(found), closed)


def duality_gap(theta: float, r: ArrayLike, a: float, *, eta: float = 0.0) -> Array:
    """Return `required_norm - r`: negative exactly where `V(theta) < 0` in the unscaled dual, i.e. certified (T4).

    Args:
        theta: angle to certify, in (0, pi/2].
        r: lower bound of `<m(x), u>`.

    Example:
        >>> bool(duality_gap(np.pi / 3, 0.9, 1.46) < 0 < duality_gap(np.pi / 3, 0.9, 1.47))
        True
    """
    cos0 = max(0.0, float(np.cos(theta)))
    return required_norm(cos0, a, eta=eta) - np.asarray(r, dtype=np.float64)

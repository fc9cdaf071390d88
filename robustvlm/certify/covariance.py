"""Covariance certificate (T7), and the cone around a published direction that uses it sideways (T3, T5, T7)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.band import Band
from robustvlm.certify.bounds.fixed import kl_upper_mean
from robustvlm.certify.cone import join, side_upper
from robustvlm.certify.distribution import A_MAX, layer_cake, sorted_for
from robustvlm.certify.normal import Array, check_alpha, check_cos0, check_sigma, largest_true
from robustvlm.certify.scores import as_scores, unit_rows, unit_vector


def hcr_drift(variance: ArrayLike, a: ArrayLike) -> Array:
    """Return `sqrt(variance (e^{a^2} - 1)) >= |<m(x') - m(x), w>|` for a direction with that variance (T7).

    With the largest eigenvalue of Cov(f) (at most `1 - r^2`) it bounds `||m(x') - m(x)||`. Source: Hammersley 1950,
    Chapman and Robbins 1951.

    Example:
        >>> round(float(hcr_drift(0.02, 1.0)), 5)
        0.18538
    """
    a = np.asarray(a, dtype=np.float64)
    return np.asarray(np.sqrt(np.asarray(variance, dtype=np.float64) * np.expm1(a * a)))


def eigenvalue_upper(eigenvalue: float, n: int, alpha: float) -> float:
    """Return an upper bound of the top eigenvalue of `E[g g^T]`, ||g|| <= 1, from the sample's top eigenvalue (T7).

    Free of the dimension: the true top eigenvector is one fixed direction, along which the sample's quadratic form is a
    mean of [0, 1] variables that is at most the sample's top eigenvalue.

    Example:
        >>> round(eigenvalue_upper(0.02, 10_000, 0.001), 6)
        0.025653
    """
    return float(kl_upper_mean(min(max(eigenvalue, 0.0), 1.0), n, alpha))


@dataclass(frozen=True)
class Sideways:
    """Upper bounds for the part of the feature orthogonal to a direction u (T7).

    Attributes:
        eta: bound of `||P m(x)||`.
        lam: bound of the top eigenvalue of `E[P f f^T P]`.
        alpha: joint error probability.
    """

    eta: float
    lam: float
    alpha: float

    def at(self, a: ArrayLike) -> Array:
        """Return `s(a) >= ||P m(x')||`: the better of T2 and T7, which share one confidence event."""
        return np.minimum(side_upper(self.eta, a), self.eta + hcr_drift(self.lam, a))


def sideways(features: ArrayLike, direction: ArrayLike, alpha: float) -> Sideways:
    """Return the sideways bounds from unit features [n, D] and a direction [D] chosen without them (T7).

    Half of `alpha` goes to the eigenvalue and half to the mean. A failed row (NaN) gets a full sideways length in the
    worst direction: its share is added to both bounds.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [0.8, -0.6]], (500, 1))
        >>> bounds = sideways(rows, [1.0, 0.0], 0.002)
        >>> round(bounds.eta, 3), round(bounds.lam, 3)
        (0.081, 0.418)
    """
    level = log(2.0 / check_alpha(alpha))
    rows, u = unit_rows(features), unit_vector(direction)
    n = len(rows)
    failed = np.asarray(np.isnan(rows).any(axis=1))
    kept = np.where(failed[:, None], 0.0, rows)
    side = kept - np.outer(kept @ u, u)
    lost = float(failed.mean())
    gram = side.T @ side if side.shape[1] <= n else side @ side.T  # the same non-zero eigenvalues, the smaller matrix
    top = float(np.linalg.eigvalsh(gram / n)[-1]) + lost
    lam = eigenvalue_upper(top, n, 0.5 * alpha)
    mean = float(np.linalg.norm(side.mean(axis=0))) + lost
    eta = mean + sqrt(2.0 * lam * level / n) + 2.0 * level / (3.0 * n)  # Bernstein along the true mean's direction
    return Sideways(min(1.0, eta), lam, alpha)


def direction_cos(scores: ArrayLike, a: ArrayLike, band: Band, side: Sideways) -> Array:
    """Return the certified `cos(m(x'), u)` for a published direction u, or -1 (T3 with T5 forwards, T7 sideways).

    Holds with error probability `band.alpha + side.alpha`, for all `a` at once.

    Args:
        scores: [n] of `(1 + <f, u>) / 2`.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> round(float(direction_cos([0.9] * 1000, 0.5, ell_band(1000, 5e-4), Sideways(0.1, 0.05, 5e-4))), 3)
        0.958
    """
    return _cos(sorted_for(scores, band), np.asarray(a, dtype=np.float64), band, side)


def _cos(levels: Array, a: Array, band: Band, side: Sideways) -> Array:
    return join(2.0 * layer_cake(levels, band.lower, a) - 1.0, side.at(a))


def direction_radius(scores: ArrayLike, cos0: float, sigma: float, band: Band, side: Sideways) -> float:
    """Return the largest radius at which `direction_cos` is at least `cos0` (and above zero); 0 means ABSTAIN.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> round(direction_radius([0.9] * 1000, 0.5, 0.25, ell_band(1000, 5e-4), Sideways(0.1, 0.05, 5e-4)), 2)
        0.37
    """
    check_cos0(cos0)
    levels = sorted_for(as_scores(scores), band)

    def certified(a: Array) -> Array:
        cos = _cos(levels, a, band, side)
        return np.asarray((cos >= cos0) & (cos > 0.0))

    return check_sigma(sigma) * float(largest_true(certified, 0.0, A_MAX, steps=30))

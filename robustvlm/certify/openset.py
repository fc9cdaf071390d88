"""Certified open-set decisions for `S = max_k min_a <z, mu_k - lam b_a>` with z the smoothed feature (T5, T8).

Accepting bounds S from below with one class from the pilot (a minimum over antibodies); rejecting bounds it from above
with one antibody per class from the pilot (a maximum over classes). Both are minima over a fixed set of claims and need
no correction. The side to test, the class and the antibodies come from the pilot, tau from other data altogether.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.band import Band
from robustvlm.certify.bounds.fixed import kl_upper_mean
from robustvlm.certify.cone import norm_lower, norm_upper
from robustvlm.certify.halfspace import halfspace_lower, halfspace_shift
from robustvlm.certify.normal import Array, check_sigma
from robustvlm.certify.scores import mean_feature
from robustvlm.errors import UserError


@dataclass(frozen=True)
class NormRange:
    """Bounds `low <= ||m(x)|| <= high`, for the score of the *normalised* smoothed feature; their alpha adds up."""

    low: float
    high: float


def contrast_vectors(prototypes: ArrayLike, antibodies: ArrayLike, lam: float) -> Array:
    """Return `v_ka = mu_k - lam b_a`, [K, A, D]; without antibodies (A = 0) just the prototypes, [K, 1, D].

    Raises:
        UserError: `lam` is negative or the dimensions differ.

    Example:
        >>> contrast_vectors([[1.0, 0.0]], [[0.0, 1.0]], 0.5).tolist()
        [[[1.0, -0.5]]]
    """
    mu, b = np.asarray(prototypes, dtype=np.float64), np.asarray(antibodies, dtype=np.float64)
    if not lam >= 0.0:
        raise UserError(f"the weight of the antibodies must not be negative, got {lam}")
    if b.size == 0:
        return mu[:, None, :]
    if mu.ndim != 2 or b.ndim != 2 or mu.shape[1] != b.shape[1]:
        raise UserError(f"expected prototypes [K, D] and antibodies [A, D], got {list(mu.shape)} and {list(b.shape)}")
    return mu[:, None, :] - lam * b[None, :, :]


def openset_score(z: ArrayLike, vectors: Array) -> float:
    """Return `max_k min_a <z, v_ka>` for one feature [D].

    Example:
        >>> openset_score([1.0, 0.0], contrast_vectors([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]], 0.5))
        1.0
    """
    return float((vectors @ np.asarray(z, dtype=np.float64)).min(axis=1).max())


def pilot_choice(z: ArrayLike, vectors: Array) -> tuple[int, Array]:
    """Return the class `k*` and, per class, the antibody `a*(k)` that decide the score at a pilot feature [D].

    Example:
        >>> k, a = pilot_choice([1.0, 0.0], contrast_vectors([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]], 0.5))
        >>> k, a.tolist()
        (0, [1, 1])
    """
    values = vectors @ np.asarray(z, dtype=np.float64)
    return int(values.min(axis=1).argmax()), np.asarray(values.argmin(axis=1))


def score_lower(features: ArrayLike, vectors: Array, k: int, a: float, band: Band) -> float:
    """Return a lower bound of the score of z = m(x') within `a` sigmas: `min_a L_{v_ka}`, k from the pilot.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> rows, v = [[0.6, 0.8]] * 1000, contrast_vectors([[0.0, 1.0]], [], 0.0)
        >>> round(score_lower(rows, v, 0, 0.5, ell_band(1000, 0.001)), 3)
        0.733
    """
    return float(halfspace_lower(features, vectors[k], a, band).min())


def score_upper(features: ArrayLike, vectors: Array, chosen: ArrayLike, a: float, band: Band) -> float:
    """Return an upper bound of the score of z = m(x') within `a` sigmas: `max_k U_{v_k,a*(k)}`, a* from the pilot.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> rows, v = [[0.6, 0.8]] * 1000, contrast_vectors([[0.0, 1.0]], [], 0.0)
        >>> round(score_upper(rows, v, [0], 0.5, ell_band(1000, 0.001)), 3)
        0.807
    """
    picked = vectors[np.arange(len(vectors)), np.asarray(chosen, dtype=np.int64)]
    return float((-halfspace_lower(features, -picked, a, band)).max())


def acceptance_radius(
    features: ArrayLike, vectors: Array, k: int, tau: float, sigma: float, band: Band, *, norm: NormRange | None = None
) -> float:
    """Return the radius inside which the score stays at least `tau`; 0 means ABSTAIN.

    Args:
        features: [n, D] estimation features, n = band.n.
        vectors: [K, A, D] from `contrast_vectors`.
        k: class from the pilot.
        norm: given, the score is that of `z = m(x') / ||m(x')||` and tau is compared with `<m(x'), v> / N(a)`.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> rows, v = [[0.6, 0.8]] * 1000, contrast_vectors([[0.0, 1.0]], [], 0.0)
        >>> round(acceptance_radius(rows, v, 0, 0.5, 0.25, ell_band(1000, 0.001)), 3)
        0.33
    """
    grows = tau > 0.0  # a positive threshold is hardest at the largest norm, a negative one at the smallest

    def threshold(a: float) -> float:
        return tau if norm is None else tau * float(norm_upper(norm.high, a) if grows else norm_lower(norm.low, a))

    return check_sigma(sigma) * halfspace_shift(features, vectors[k], threshold, band)


def rejection_radius(
    features: ArrayLike,
    vectors: Array,
    chosen: ArrayLike,
    tau: float,
    sigma: float,
    band: Band,
    *,
    norm: NormRange | None = None,
) -> float:
    """Return the radius inside which the score stays below `tau`; 0 means ABSTAIN. Arguments as `acceptance_radius`.

    Args:
        chosen: [K] antibody per class, from the pilot.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> rows, v = [[0.6, 0.8]] * 1000, contrast_vectors([[0.0, 1.0]], [], 0.0)
        >>> round(rejection_radius(rows, v, [0], 0.9, 0.25, ell_band(1000, 0.001)), 3)
        0.572
    """
    picked = vectors[np.arange(len(vectors)), np.asarray(chosen, dtype=np.int64)]
    shrinks = tau > 0.0

    def threshold(a: float) -> float:
        limit = tau if norm is None else tau * float(norm_lower(norm.low, a) if shrinks else norm_upper(norm.high, a))
        return float(np.nextafter(-limit, np.inf))  # strictly below tau

    return check_sigma(sigma) * halfspace_shift(features, -picked, threshold, band)


def norm_upper_bound(features: ArrayLike, alpha: float) -> float:
    """Return an upper bound of `||m(x)||` from unit features [n, D]: the Chernoff bound along the true mean (T2).

    The true direction is fixed and the sample mean along it is at most the sample mean's norm: no dimension factor.

    Example:
        >>> round(norm_upper_bound([[0.8, 0.6], [0.8, -0.6]] * 500, 0.001), 3)
        0.863
    """
    mean, lost = mean_feature(features)
    length = min(1.0, float(np.linalg.norm(mean)) + lost)
    return min(1.0, 2.0 * float(kl_upper_mean(0.5 * (1.0 + length), len(np.asarray(features)), alpha)) - 1.0)

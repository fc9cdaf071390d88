"""Certificates for prompts chosen after the samples were seen: one ball around the mean feature (T2, T7)."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from robustvlm.certify.class_margin import rival_normals
from robustvlm.certify.covariance import eigenvalue_upper
from robustvlm.certify.normal import check_alpha, check_sigma
from robustvlm.certify.scores import unit_rows
from robustvlm.errors import UserError


def mean_ball(n: int, alpha: float, *, r: float = 0.0) -> float:
    """Return a bound of `||mean of n features - m||` that holds with probability 1 - alpha (McDiarmid).

    Args:
        r: a lower bound of `||m||` that is certain, or holds on an event whose error is counted elsewhere.

    Example:
        >>> round(mean_ball(10_000, 0.001), 4)
        0.0472
    """
    if n < 1:
        raise UserError(f"a mean needs at least one sample, got n = {n}")
    return sqrt(max(0.0, 1.0 - r * r) / n) + sqrt(2.0 * log(1.0 / check_alpha(alpha)) / n)


def covariance_upper(features: ArrayLike, centre: ArrayLike, alpha: float) -> float:
    """Return an upper bound of the top eigenvalue of Cov(f) from second moments about a fixed centre (T7).

    Args:
        features: [n, D] unit features; a failed row counts with the largest possible distance.
        centre: [D] in the unit ball, from the pilot (not from `features`).

    Example:
        >>> rows = np.tile([[0.8, 0.6], [0.8, -0.6]], (500, 1))
        >>> round(covariance_upper(rows, [0.8, 0.0], 0.001), 3)
        0.51
    """
    c = np.asarray(centre, dtype=np.float64)
    if not np.linalg.norm(c) <= 1.0 + 1e-6:
        raise UserError("the centre of the second moments must lie in the unit ball")
    rows = unit_rows(features)
    failed = np.asarray(np.isnan(rows).any(axis=1))
    half = np.where(failed[:, None], 0.0, 0.5 * (rows - c))  # at most one long, so that its moments lie in [0, 1]
    n = len(half)
    gram = half.T @ half if half.shape[1] <= n else half @ half.T
    top = float(np.linalg.eigvalsh(gram / n)[-1]) + float(failed.mean())
    return min(1.0, 4.0 * eigenvalue_upper(top, n, alpha))  # a covariance of unit vectors has trace at most one


def vocabulary_radius(
    mean: ArrayLike, text: ArrayLike, label: int, sigma: float, *, ball: float, variance: float = 1.0
) -> float:
    """Return the radius inside which the mean feature's class is `label`, for prompts chosen at any time (T2, T7).

    The two events behind `ball` and `variance` cover all directions at once: label and prompts may depend on the
    samples, and any number of prompt sets may be certified at the same alpha.

    Args:
        mean: [D] mean of the n estimation features (`mean_feature`; add its share of failed rows to `ball`).
        text: [K, D] class embeddings.
        ball: bound of `||mean - m||` (`mean_ball`).
        variance: bound of the top eigenvalue of Cov(f): `1 - r^2`, or `covariance_upper`.

    Example:
        >>> round(vocabulary_radius([0.9, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, ball=0.05, variance=0.1), 3)
        0.305
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    room = float((normals @ np.asarray(mean, dtype=np.float64)).min()) - ball
    if not room > 0.0:
        return 0.0
    by_variance = sqrt(np.log1p(room * room / max(variance, 1e-12)))
    by_drift = 2.0 * float(ndtri(0.5 + 0.25 * min(room, 2.0 - 1e-12)))
    return check_sigma(sigma) * max(by_variance, by_drift)

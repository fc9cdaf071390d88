"""Feature certificates for the deployed smoother: the mean of n0 fresh samples instead of the ideal feature (T10)."""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.cone import norm_lower
from robustvlm.certify.deployed import deployed_cos
from robustvlm.certify.fcsb import VACUOUS, fcsb_inner
from robustvlm.certify.normal import Array, check_alpha, check_cos0, check_sigma, largest_true
from robustvlm.certify.vector_table import vector_table


def deployed_feature_cos(r: ArrayLike, a: float, n0: int, alpha0: float) -> Array:
    """Return the certified cosine between the mean of n0 fresh samples at x' and m(x), w.p. 1 - alpha0, or -1 (T10).

    The larger of two bounds at alpha0 / 2 each: the angle certificate (T4) widened by the ball that the mean of n0
    samples lies in, and Chernoff's bound along m(x) from the inner product (T1). The inference noise must be fresh, and
    x' chosen without knowing it.

    Args:
        r: lower bounds of ||m(x)||, any shape.
        a: eps / sigma.

    Example:
        >>> deployed_feature_cos([0.5, 0.9, 0.99], 0.5, 1000, 0.001).round(2).tolist()
        [0.02, 0.9, 0.97]
    """
    r = np.asarray(r, dtype=np.float64)
    part = 0.5 * check_alpha(alpha0)
    inner = deployed_cos(fcsb_inner(0.5 * (1.0 + r), a), n0, part)
    return np.maximum(inner, _by_angle(vector_table().cos(r, a), norm_lower(r, a), n0, part))


def _by_angle(cosine: Array, norm: Array, n0: int, alpha0: float) -> Array:
    """As `deployed_from_angle`, for arrays."""
    ball = np.sqrt(np.maximum(0.0, 1.0 - norm * norm) / n0) + np.sqrt(2.0 * log(1.0 / alpha0) / n0)
    turn = np.arcsin(np.minimum(1.0, ball / np.maximum(norm, 1e-12)))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0)) + turn
    sound = (cosine > 0.0) & (ball < norm) & (angle < np.pi / 2)
    return np.where(sound, np.cos(np.where(sound, angle, 0.0)), VACUOUS)


def deployed_feature_radius(r: float, cos0: float, sigma: float, n0: int, alpha0: float) -> float:
    """Return the radius inside which the mean of n0 fresh samples keeps cosine `cos0` to m(x), w.p. 1 - alpha0 (T10).

    Never above the ideal smoother's radius; 0 is ABSTAIN.

    Example:
        >>> [round(deployed_feature_radius(0.9, 0.5, 1.0, n0, 0.001), 2) for n0 in (16, 256, 10_000)]
        [0.0, 0.88, 1.31]
    """
    least = max(check_cos0(cos0), 1e-12)
    high = float(vector_table().radius(r, cos0, 1.0))
    found = largest_true(lambda a: deployed_feature_cos(r, float(a), n0, alpha0) >= least, 0.0, high, steps=20)
    return check_sigma(sigma) * float(found)

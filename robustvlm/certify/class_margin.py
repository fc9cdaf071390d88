"""Certified zero-shot class of the mean feature: `argmax_k <m(x'), t_k>` stays y (P1; T5 or T0, with T8)."""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.band import Band
from robustvlm.certify.bounds.betting import betting_lower, log_gains, mix
from robustvlm.certify.fcsb import fcsb_radius
from robustvlm.certify.halfspace import halfspace_shift
from robustvlm.certify.normal import Array, check_alpha, check_sigma
from robustvlm.certify.scores import as_scores, unit_rows
from robustvlm.errors import UserError

_CHUNK = 16


def rival_normals(text: ArrayLike, label: int) -> Array | None:
    """Return unit normals `(t_y - t_k) / ||t_y - t_k||` [K-1, D], or None if a rival has the label's own embedding.

    Args:
        text: class embeddings [K, D].
        label: y, chosen without the estimation samples.

    Raises:
        UserError: the label is not one of the classes, or there is no rival.

    Example:
        >>> rival_normals([[1.0, 0.0], [0.0, 1.0]], 0).round(4).tolist()
        [[0.7071, -0.7071]]
        >>> rival_normals([[1.0, 0.0], [1.0, 0.0]], 0) is None
        True
    """
    t = np.asarray(text, dtype=np.float64)
    if t.ndim != 2 or len(t) < 2:
        raise UserError(f"expected embeddings [K, D] of at least two classes, got shape {list(t.shape)}")
    if not 0 <= label < len(t):
        raise UserError(f"the label must be one of the {len(t)} classes, got {label}")
    differences = t[label] - np.delete(t, label, axis=0)
    lengths = np.linalg.norm(differences, axis=1)
    if not lengths.min() > 1e-9:  # also a NaN
        return None
    return np.asarray(differences / lengths[:, None])


def class_margin_radius(features: ArrayLike, text: ArrayLike, label: int, sigma: float, band: Band) -> float:
    """Return the radius inside which the mean feature's class is `label`; 0 means ABSTAIN (P1-CDF; T5, T8).

    Every rival's margin is bounded at the band's alpha and no correction for their number is needed: the claim is the
    minimum over a fixed set of rivals.

    Args:
        features: [n, D] unit features of estimation noise, n = band.n; failed passes as NaN rows.
        text: [K, D] class embeddings that do not depend on the features.
        label: from a pilot sample, never from `features`.

    Example:
        >>> from robustvlm.certify.bounds.band import ell_band
        >>> rows = [[0.8, 0.6], [1.0, 0.0]] * 500
        >>> round(class_margin_radius(rows, [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, ell_band(1000, 0.001)), 3)
        0.323
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    return check_sigma(sigma) * halfspace_shift(features, normals, lambda _: 0.0, band)


def mean_margin_radius(features: ArrayLike, text: ArrayLike, label: int, sigma: float, alpha: float) -> float:
    """Return the radius from the smallest mean margin alone: `sigma Phi^-1(min_k LCB_k)` (P1-mean; T0, T8).

    Uses the betting bound for every rival. Weaker than `class_margin_radius` by a wide margin on CLIP geometry; kept
    for comparison and because it is valid at any stopping time.

    Example:
        >>> rows = [[0.8, 0.6], [1.0, 0.0]] * 500
        >>> round(mean_margin_radius(rows, [[1.0, 0.0], [0.0, 1.0]], 0, 0.25, 0.001), 3)
        0.126
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    rows = unit_rows(features)
    scores = as_scores(0.5 * (1.0 + rows @ normals.T))
    return float(fcsb_radius(least_lower(scores, alpha), 0.0, sigma))


def least_lower(scores: Array, alpha: float) -> float:
    """Return the least of the betting lower bounds of the columns of scores [n, K], bisecting only where needed.

    Example:
        >>> round(least_lower(np.full((100, 3), 0.9), 0.001), 2)
        0.82
    """
    level = log(1.0 / check_alpha(alpha))
    order = np.argsort(scores.mean(axis=0))  # the smallest margins first: most others then pass one comparison
    best = 1.0
    for i in range(0, len(order), _CHUNK):
        block = scores[:, order[i : i + _CHUNK]]
        worse = ~(mix(log_gains(block, best)) >= level) if best > 0.0 else np.zeros(block.shape[1], dtype=bool)
        if worse.any():
            best = min(best, float(betting_lower(block[:, worse], alpha).min()))
    return best


def class_angle(direction: ArrayLike, text: ArrayLike, label: int) -> float:
    """Return `beta = min_k arcsin <u, v_k>`, the angle u may turn before another class wins (P2); at most 0 if it has.

    An angle certificate below beta (`vector_radius(r, cos(beta), ...)`) certifies the class.

    Example:
        >>> round(float(np.degrees(class_angle([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], 0))), 6)
        45.0
    """
    normals = rival_normals(text, label)
    if normals is None:
        return 0.0
    u = unit_rows(np.atleast_2d(np.asarray(direction, dtype=np.float64)))[0]
    return float(np.arcsin(np.clip((normals @ u).min(), -1.0, 1.0)))

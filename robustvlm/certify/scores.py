"""Scores in [0, 1] and unit features, with failed passes counted as the worst value rather than dropped."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.normal import Array
from robustvlm.errors import UserError

_SLACK = 1e-3  # rounding of half-precision features; anything further out is not a score


def as_scores(values: ArrayLike) -> Array:
    """Return `values` as float64 scores in [0, 1], samples along axis 0; a NaN counts as 0, the worst value.

    Every lower bound in this package passes through here. Upper bounds are lower bounds of `1 - x`, so a NaN is the
    worst value for them too. Dropping failed samples instead would be a selection by content.

    Raises:
        UserError: a value is infinite or outside [0, 1] by more than 1e-3, or there is no sample.

    Example:
        >>> as_scores([0.2, float("nan"), 1.0000001]).tolist()
        [0.2, 0.0, 1.0]
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim == 0 or scores.shape[0] == 0:
        raise UserError("expected at least one score along axis 0, got none")
    scores = np.where(np.isnan(scores), 0.0, scores)
    if scores.min(initial=0.0) < -_SLACK or scores.max(initial=1.0) > 1.0 + _SLACK:
        raise UserError(f"scores must lie in [0, 1], got values from {scores.min():.6g} to {scores.max():.6g}")
    return np.asarray(np.clip(scores, 0.0, 1.0))


def unit_rows(features: ArrayLike) -> Array:
    """Return unit features [n, D] in float64, renormalised; a row that is not finite becomes a row of NaN.

    Raises:
        UserError: `features` is not a matrix, or a finite row's norm differs from one by more than 1e-2 (the theorems
            are about features on the unit sphere; normalise inside the expectation).

    Example:
        >>> unit_rows([[0.6, 0.8], [float("nan"), 1.0]]).tolist()
        [[0.6, 0.8], [nan, nan]]
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise UserError(f"expected features of shape [n, D] with n >= 1, got shape {list(rows.shape)}")
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    rows = np.where(finite[:, None], rows, np.nan)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    off = np.abs(norms[finite] - 1.0)
    if off.size and off.max() > 1e-2:
        raise UserError(f"expected unit features, got a row of norm {norms[finite].flat[off.argmax()]:.4g}")
    return np.asarray(rows / norms)


def unit_vector(direction: ArrayLike) -> Array:
    """Return `direction` [D] scaled to length one.

    Raises:
        UserError: it is not a vector, or its length is zero or not finite.

    Example:
        >>> unit_vector([3.0, 4.0]).tolist()
        [0.6, 0.8]
    """
    vector = np.asarray(direction, dtype=np.float64)
    length = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
    if not (length > 0.0 and np.isfinite(length)):
        raise UserError("expected a direction: a vector [D] of positive finite length")
    return np.asarray(vector / length)


def direction_scores(features: ArrayLike, direction: ArrayLike) -> Array:
    """Return `g = (1 + <f, u>) / 2` in [0, 1] for unit features [n, D] and directions [D] or [K, D] (scaled to one).

    The directions must not depend on the samples in `features`: take them from text, from the clean image or from an
    independent pilot sample. Rows that are NaN give the worst score 0.

    Example:
        >>> direction_scores([[1.0, 0.0], [0.0, 1.0]], [2.0, 0.0]).tolist()
        [1.0, 0.5]
    """
    rows = unit_rows(features)
    directions = np.asarray(direction, dtype=np.float64)
    units = unit_vector(directions) if directions.ndim == 1 else np.stack([unit_vector(row) for row in directions])
    return as_scores(0.5 * (1.0 + rows @ units.T))


def mean_feature(features: ArrayLike) -> tuple[Array, float]:
    """Return the mean [D] of unit features [n, D] with failed rows as zero vectors, and the share of failed rows.

    Whatever the failed rows would have been, the true sample mean is within that share of the returned one.

    Example:
        >>> mean, lost = mean_feature([[1.0, 0.0], [0.0, float("nan")]])
        >>> mean.tolist(), lost
        ([0.5, 0.0], 0.5)
    """
    rows = unit_rows(features)
    return np.nan_to_num(rows, nan=0.0).mean(axis=0), float(np.isnan(rows).any(axis=1).mean())

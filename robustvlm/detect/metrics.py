"""How well a score tells known from unknown images: AUROC, FPR at a TPR, average precision; ties handled exactly.

Known images are the positives and have the higher scores. All metrics are read off one curve: thresholds at the
distinct scores, descending, where everything with a score at or above the threshold is accepted. Images may carry
weights, so that a bootstrap sample is a matter of counts (`weighted_metrics`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robustvlm.errors import UserError

Array = npt.NDArray[np.float64]

METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")
TPR = 0.95
_SLACK = 1e-9  # a share of counts such as 0.95 * 20 must not miss its whole number by rounding


@dataclass(frozen=True, eq=False)
class Metrics:
    """One value per row of weights [B]: AUROC, FPR at 95% TPR, average precision of known and of unknown images."""

    auroc: Array
    fpr95: Array
    aupr_in: Array
    aupr_out: Array


def auroc(known: npt.ArrayLike, unknown: npt.ArrayLike) -> float:
    """Return the chance that a known image scores above an unknown one, ties counted half.

    Example:
        >>> auroc([3.0, 2.0], [2.0, 1.0])
        0.875
    """
    return float(all_metrics(known, unknown).auroc[0])


def fpr_at_tpr(known: npt.ArrayLike, unknown: npt.ArrayLike, tpr: float = TPR) -> float:
    """Return the share of unknown images accepted at the highest threshold that accepts `tpr` of the known ones.

    Example:
        >>> fpr_at_tpr([4.0, 3.0, 2.0, 1.0], [2.5, 0.0], tpr=0.75)
        0.5
    """
    _, others = checked_scores(known, unknown)
    return float((others >= threshold_at_tpr(known, tpr)).mean())


def threshold_at_tpr(known: npt.ArrayLike, tpr: float = TPR) -> float:
    """Return the highest threshold at which at least `tpr` of the known images score at or above it.

    Example:
        >>> threshold_at_tpr([4.0, 3.0, 2.0, 1.0], 0.75)
        2.0
    """
    if not 0 < tpr <= 1:
        raise UserError(f"the true positive rate must be above 0 and at most 1, got {tpr}: pass for example 0.95")
    scores = _finite(known, "known")
    return float(np.sort(scores)[::-1][math.ceil(tpr * len(scores) - _SLACK) - 1])


def average_precision(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Return the area under the precision-recall curve as a sum of steps, without interpolation between points.

    For unknown images as positives (AUPR-out) pass negated scores.

    Example:
        >>> average_precision([2.0], [1.0]), average_precision([1.0], [2.0])
        (1.0, 0.5)
    """
    return float(all_metrics(positive, negative).aupr_in[0])


def all_metrics(known: npt.ArrayLike, unknown: npt.ArrayLike) -> Metrics:
    """Return all metrics of two sets of scores, each as an array of one value."""
    high, low = checked_scores(known, unknown)
    return weighted_metrics(high, low, np.ones((1, len(high))), np.ones((1, len(low))))


def weighted_metrics(known: Array, unknown: Array, known_weights: Array, unknown_weights: Array) -> Metrics:
    """Return all metrics under each of B weightings: scores [n] and [m], weights [B, n] and [B, m].

    Weights are not negative, and each row has a positive sum on both sides.
    """
    scores = np.concatenate([known, unknown])
    distinct, place = np.unique(-scores, return_inverse=True)  # ascending in -score: thresholds from high to low
    hits = _per_threshold(known_weights, place[: len(known)], len(distinct))
    alarms = _per_threshold(unknown_weights, place[len(known) :], len(distinct))
    true, false = hits.cumsum(axis=1), alarms.cumsum(axis=1)
    positives, negatives = true[:, -1:], false[:, -1:]
    # Known images ranked strictly above each unknown one, and half of those at the same score.
    above = (alarms * (true - 0.5 * hits)).sum(axis=1) / (positives * negatives)[:, 0]
    reached = (true >= TPR * positives - _SLACK).argmax(axis=1)
    rows = np.arange(len(reached))
    return Metrics(
        auroc=above,
        fpr95=false[rows, reached] / negatives[:, 0],
        aupr_in=_steps(hits, true, false) / positives[:, 0],
        aupr_out=_steps(alarms, negatives - false + alarms, positives - true + hits) / negatives[:, 0],
    )


def roc_points(known: npt.ArrayLike, unknown: npt.ArrayLike) -> tuple[Array, Array]:
    """Return false and true positive rates at every threshold, from (0, 0) to (1, 1).

    Example:
        >>> [list(map(float, rates)) for rates in roc_points([2.0], [1.0])]
        [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    high, low = checked_scores(known, unknown)
    thresholds = np.unique(np.concatenate([high, low]))[::-1]
    accepted = [1 - np.searchsorted(np.sort(side), thresholds) / len(side) for side in (low, high)]
    false, true = (np.concatenate([[0.0], rates]) for rates in accepted)
    return false, true


def _per_threshold(weights: Array, place: npt.NDArray[np.int64], count: int) -> Array:
    """Return the weight at each distinct score, [B, n] -> [B, count]."""
    order = np.argsort(place, kind="stable")
    at, starts = np.unique(place[order], return_index=True)
    total = np.zeros((len(weights), count))
    total[:, at] = np.add.reduceat(weights[:, order], starts, axis=1)
    return total


def _steps(weight: Array, positive: Array, negative: Array) -> Array:
    """Return the sum over thresholds of weight times precision; a threshold that accepts nothing counts nothing."""
    total = positive + negative
    precision = np.divide(positive, total, out=np.zeros_like(total), where=total > 0)
    return (weight * precision).sum(axis=1)


def checked_scores(known: npt.ArrayLike, unknown: npt.ArrayLike) -> tuple[Array, Array]:
    """Return both sets of scores as arrays [n] and [m]; UserError where one is empty, of another shape or has NaN."""
    return _finite(known, "known"), _finite(unknown, "unknown")


def _finite(scores: npt.ArrayLike, which: str) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"metrics need scores of at least one {which} image, got an array of shape {list(array.shape)}")
    if np.isnan(array).any():
        raise UserError(f"{int(np.isnan(array).sum())} scores of {which} images are NaN: leave those images out")
    return array

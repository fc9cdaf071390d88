"""The deployed open-set rule: accept or reject from n0 fresh samples, abstain when they do not decide it (T10)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.fixed import kl_lower
from robustvlm.certify.normal import Array, check_alpha
from robustvlm.certify.openset import pilot_choice
from robustvlm.certify.scores import as_scores, mean_feature, unit_rows
from robustvlm.errors import UserError


def predict_openset(
    features: ArrayLike, vectors: Array, tau: float, alpha0: float
) -> Literal["accept", "reject", "abstain"]:
    """Return the decision on the unnormalised score of m(x') from n0 fresh inference features (T10, T8).

    The first half chooses the class and the antibodies, the second half has to show the score on one side of `tau`.
    Inside an acceptance radius "reject" has probability at most alpha0, inside a rejection radius "accept".

    Args:
        features: [n0, D] unit features, n0 >= 2; failed passes as NaN rows.
        vectors: [K, A, D] from `contrast_vectors`.

    Raises:
        UserError: there are fewer than two features.

    Example:
        >>> v = np.array([[[0.0, 1.0]]])
        >>> [predict_openset([[0.6, 0.8]] * 100, v, tau, 0.001) for tau in (0.3, 0.78, 1.0)]
        ['accept', 'abstain', 'reject']
    """
    rows = unit_rows(features)
    if len(rows) < 2:
        raise UserError("an abstaining decision needs at least two inference samples")
    half = len(rows) // 2
    k, chosen = pilot_choice(mean_feature(rows[:half])[0], vectors)
    if float(_lower(rows[half:], vectors[k], alpha0).min()) >= tau:
        return "accept"
    picked = vectors[np.arange(len(vectors)), chosen]
    return "reject" if float((-_lower(rows[half:], -picked, alpha0)).max()) < tau else "abstain"


def _lower(rows: Array, vectors: Array, alpha: float) -> Array:
    """Lower bounds of `<m, v>` per vector [K, D]."""
    lengths = np.linalg.norm(vectors, axis=1)
    units = vectors / np.maximum(lengths, 1e-300)[:, None]
    return lengths * (2.0 * kl_lower(as_scores(0.5 * (1.0 + rows @ units.T)), check_alpha(alpha)) - 1.0)

"""A direction that only looks back: lower bounds of the smoothed feature's norm without a pilot sample (T3, T4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.betting import betting_lower
from robustvlm.certify.normal import Array
from robustvlm.certify.scores import as_scores, unit_rows, unit_vector


class PredictableDirection:
    """Scores each feature against the normalised sum of the features before it.

    Given the past, `x_i = (1 + <f_i, u_{i-1}>) / 2` has mean at most `(1 + ||m||) / 2`, so the betting wealth against
    `||m|| <= r0` is a supermartingale: no pilot, no dimension factor, valid at any time. (A direction estimated on the
    same samples it is scored on would be wrong almost always in high dimension.) Results do not depend on batching.

    Args:
        dim: feature dimension D.
        start: optional direction known before the noise is drawn (the clean feature, a pilot mean). Without it the
            first feature only sets the direction and gives no score.

    Example:
        >>> direction = PredictableDirection(2)
        >>> direction.scores([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).round(4).tolist()
        [0.5, 0.995]
    """

    def __init__(self, dim: int, *, start: ArrayLike | None = None) -> None:
        self.total = np.zeros(dim) if start is None else unit_vector(start).copy()

    def scores(self, features: ArrayLike) -> Array:
        """Return the scores of unit features [n, D], in order; rows met while there is no direction give none.

        A failed row (NaN) scores 0, the worst value, and does not move the direction.
        """
        rows = unit_rows(features)
        moves = np.nan_to_num(rows, nan=0.0)
        sums = np.cumsum(np.vstack([self.total, moves]), axis=0)
        self.total = sums[-1]
        lengths = np.linalg.norm(sums[:-1], axis=1)
        known = lengths > 1e-9
        cosines = np.einsum("nd,nd->n", rows[known], sums[:-1][known]) / lengths[known]
        return as_scores(0.5 * (1.0 + cosines)) if known.any() else np.zeros(0)


def norm_lower_bound(scores: ArrayLike, alpha: float) -> float:
    """Return a lower bound of `||m(x)||` from scores of a `PredictableDirection`, valid at any stopping time.

    Only the betting bound is offered: the scores depend on each other through the direction, and the betting wealth is
    the bound that allows this.

    Example:
        >>> round(norm_lower_bound([0.95] * 1000, 0.001), 2)
        0.88
    """
    return max(0.0, 2.0 * float(betting_lower(scores, alpha)) - 1.0)

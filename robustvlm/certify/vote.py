"""Hard-vote smoothing (Cohen et al., ICML 2019): another deployed rule, `argmax_k P(argmax_j <f, t_j> = k)`.

Its radius says nothing about the classifier of the mean feature, and the larger of the two radii is no certificate of
either (see `record.best_of`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from robustvlm.certify.bounds.fixed import clopper_pearson_lower
from robustvlm.certify.fcsb import fcsb_radius
from robustvlm.certify.normal import check_alpha
from robustvlm.errors import UserError


def vote_radius(successes: int, n: int, sigma: float, alpha: float, *, share: float = 0.5) -> float:
    """Return the radius inside which the label's vote share stays above `share`; 0 means ABSTAIN.

    `sigma (Phi^-1(p) - Phi^-1(share))` with p the exact lower bound of the share at the image.

    Args:
        successes: estimation votes for the label that the pilot chose; failed passes are votes for no class.
        n: all estimation passes, the failed ones included.

    Example:
        >>> round(vote_radius(9_900, 10_000, 0.25, 0.001), 4), vote_radius(50, 100, 0.25, 0.001)
        (0.5531, 0.0)
    """
    return float(fcsb_radius(clopper_pearson_lower(successes, n, alpha), 2.0 * share - 1.0, sigma))


def vote_predict(counts: ArrayLike, alpha: float) -> int | None:
    """Return the class whose votes lead significantly, or None for ABSTAIN (their PREDICT, two-sided binomial test).

    Args:
        counts: votes per class [K] from fresh inference noise.

    Raises:
        UserError: there are fewer than two classes.

    Example:
        >>> vote_predict([90, 10, 0], 0.001), vote_predict([55, 45, 0], 0.001)
        (0, None)
    """
    votes = np.asarray(counts, dtype=np.int64)
    if votes.ndim != 1 or len(votes) < 2:
        raise UserError("expected vote counts of at least two classes")
    second, first = np.argsort(votes, kind="stable")[-2:]
    top, total = int(votes[first]), int(votes[first] + votes[second])
    if total == 0 or binomtest(top, total, 0.5).pvalue > check_alpha(alpha):
        return None
    return int(first)

"""Certify `E x > m0` as soon as the samples allow it, give up as soon as they show that it will not happen."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.betting import BettingState
from robustvlm.certify.normal import check_alpha

Decision = Literal["open", "certified", "futile"]


class SequentialTest:
    """One-sided anytime-valid test of `E x > m0` with a futility stop.

    The certifying wealth is at level `alpha`. The futility wealth (the same bets on `1 - x` against `1 - m0`, at level
    `futility`) can only stop the sampling early and abstain: it costs power, never soundness. A null mean of at least
    one is impossible and futile at once; one of at most zero is replaced by 1e-6, a stronger claim.

    Example:
        >>> test = SequentialTest(0.7, alpha=0.001)
        >>> while test.decision == "open":
        ...     decision = test.update([0.95, 0.85] * 8)
        >>> decision, test.n
        ('certified', 48)
    """

    def __init__(self, m0: float, *, alpha: float, futility: float | None = 0.01) -> None:
        self.m0 = max(float(m0), 1e-6)
        self.alpha = check_alpha(alpha)
        self.futility = None if futility is None else check_alpha(futility)
        self.n = 0
        self.decision: Decision = "open" if self.m0 < 1.0 - 1e-12 else "futile"
        if self.decision == "open":
            self._wins = BettingState(self.m0)
            self._loses = BettingState(1.0 - self.m0)

    def update(self, scores: ArrayLike) -> Decision:
        """Add scores [n] and return the decision, which is final once it is not "open"."""
        if self.decision != "open":
            return self.decision
        x = np.asarray(scores, dtype=np.float64)
        self._wins.update(x)
        self._loses.update(1.0 - np.nan_to_num(x, nan=0.0))
        self.n = self._wins.n
        if self._wins.rejected(self.alpha):
            self.decision = "certified"
        elif self.futility is not None and self._loses.rejected(self.futility):
            self.decision = "futile"
        return self.decision

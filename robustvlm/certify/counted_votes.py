"""The hard vote of any classifier: samples are class numbers, not features."""

from __future__ import annotations

import numpy as np

from robustvlm.certify.normal import Array
from robustvlm.certify.sampling import Certifier, Finding, Stage
from robustvlm.certify.vote import vote_radius
from robustvlm.errors import UserError


class CountedVotes(Certifier):
    """The radius within which most votes stay with the pilot's class (Cohen et al. 2019, CERTIFY); 0 is ABSTAIN.

    `n_pilot` samples choose the class, `n` others estimate its share by the bound of Clopper and Pearson. The column
    `votes` is that share.

    Args:
        classes: how many there are. Samples are rows [n, 1] with the number of the class; a pass that failed is NaN
            and a vote for none.

    Example:
        >>> certifier = CountedVotes(classes=2, sigma=0.25, alpha=0.001, n=1000, n_pilot=100)
        >>> while (wanted := certifier.request()) is not None:
        ...     certifier.take([[1.0]] * wanted.sure)
        >>> certifier.finding().prediction, round(certifier.finding().radius, 3)
        (1, 0.616)
    """

    def __init__(self, *, classes: int, sigma: float, alpha: float, n: int, n_pilot: int) -> None:
        super().__init__(("pilot", n_pilot), ("estimation", n), sigma=sigma, alpha=alpha, settings=(classes,))
        if n_pilot < 1:
            raise UserError("the class is chosen by samples of their own: pass n0 of at least 1")
        self.classes, self.label, self.votes = classes, -1, 0

    def _absorb(self, stage: Stage, rows: Array) -> None:
        chosen = rows[np.isfinite(rows[:, 0]), 0].astype(np.int64)
        if stage == "pilot":
            self.label = int(np.bincount(chosen, minlength=self.classes).argmax())
        else:
            self.votes += int((chosen == self.label).sum())

    def finding(self) -> Finding:
        n = self.counts["estimation"]
        return Finding(
            radius=vote_radius(self.votes, n, self.sigma, self.alpha),
            stop="fixed",
            n=n,
            n_pilot=self.counts["pilot"],
            failed=self.failed,
            prediction=self.label,
            columns={"votes": self.votes / n},
        )

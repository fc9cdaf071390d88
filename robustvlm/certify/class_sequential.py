"""Is the class certified at this radius? All rivals tested side by side, stopping as soon as all have given in."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.sequential import Decision
from robustvlm.certify.class_margin import rival_normals
from robustvlm.certify.normal import Array
from robustvlm.certify.scores import as_scores, unit_rows
from robustvlm.certify.tangent import TangentTest


class ClassTest:
    """Anytime-valid test that the mean feature's class is `label` everywhere within `a` sigmas (T6, T8).

    One `TangentTest` per rival, with references from the pilot. Each test's crossing is permanent, so rivals leave as
    they are beaten; the class is certified when none is left, at level `alpha` without correction: if the claim is
    false, some fixed rival's null is true and its wealth reaches `1 / alpha` with probability at most alpha.

    `open_rivals` is the number of rivals that are not beaten yet.

    Args:
        pilot: [n0, D] unit features from the pilot stream (may also have chosen the label).
        text: [K, D] class embeddings.
        label: y, from the pilot.
        a: radius to certify over sigma.

    Example:
        >>> rows = np.tile([[0.8, 0.6], [1.0, 0.0]], (100, 1))
        >>> test = ClassTest(rows, [[1.0, 0.0], [0.0, 1.0]], 0, a=0.5, alpha=0.001)
        >>> while test.decision == "open":
        ...     decision = test.update(rows[:32])
        >>> decision
        'certified'
    """

    def __init__(self, pilot: ArrayLike, text: ArrayLike, label: int, *, a: float, alpha: float) -> None:
        normals = rival_normals(text, label)
        self.n = 0
        self.decision: Decision = "open"
        if normals is None:  # a rival with the label's own embedding can never be beaten
            self.open_rivals, self.decision = len(np.asarray(text)) - 1, "futile"
            return
        self._normals = normals
        self.open_rivals = len(normals)
        self._test = TangentTest(_margins(unit_rows(pilot), normals), a=a, target=0.5, alpha=alpha)
        self._conclude()

    def update(self, features: ArrayLike) -> Decision:
        """Add unit features [n, D] of the estimation stream and return the decision."""
        rows = unit_rows(features)
        self.n += len(rows)
        if self.decision == "open":
            self._test.update(_margins(rows, self._normals))
            self._conclude()
        return self.decision

    def _conclude(self) -> None:
        if self._test.hopeless.any():
            self.decision = "futile"
            return
        left = ~self._test.certified
        if not left.all():
            self._test.keep(left)
            self._normals = self._normals[left]
            self.open_rivals = int(left.sum())
        if self.open_rivals == 0:
            self.decision = "certified"


def _margins(rows: Array, normals: Array) -> Array:
    return as_scores(0.5 * (1.0 + rows @ normals.T))

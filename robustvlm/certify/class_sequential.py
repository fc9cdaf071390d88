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
        self.decision: Decision = "open" if normals is not None else "futile"
        self._normals: Array = normals if normals is not None else np.zeros((0, 1))
        columns = _margins(unit_rows(pilot), self._normals).T if normals is not None else []
        self._tests = [TangentTest(column, a=a, target=0.5, alpha=alpha) for column in columns]
        if any(test.hopeless for test in self._tests):
            self.decision = "futile"

    @property
    def open_rivals(self) -> int:
        """The number of rivals that are not beaten yet."""
        return len(self._tests)

    def update(self, features: ArrayLike) -> Decision:
        """Add unit features [n, D] of the estimation stream and return the decision."""
        rows = unit_rows(features)
        self.n += len(rows)
        if self.decision != "open":
            return self.decision
        for test, column in zip(self._tests, _margins(rows, self._normals).T, strict=True):
            test.update(column)
        if any(test.hopeless and not test.certified for test in self._tests):
            self.decision = "futile"
            return self.decision
        left = [i for i, test in enumerate(self._tests) if not test.certified]
        self._tests = [self._tests[i] for i in left]
        self._normals = self._normals[left]
        if not left:
            self.decision = "certified"
        return self.decision


def _margins(rows: Array, normals: Array) -> Array:
    return as_scores(0.5 * (1.0 + rows @ normals.T))

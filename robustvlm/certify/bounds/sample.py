"""A sample whose size is decided before the first value: fixed-n bounds cannot be peeked at."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from robustvlm.certify.bounds.betting import betting_lower
from robustvlm.certify.bounds.fixed import bernstein_lower, hoeffding_lower, kl_lower
from robustvlm.certify.normal import Array
from robustvlm.certify.scores import as_scores
from robustvlm.errors import UserError, nearest

LOWER_BOUNDS: dict[str, Callable[[Array, float], Array]] = {
    "hoeffding": hoeffding_lower,
    "bernstein": bernstein_lower,
    "kl": kl_lower,
    "betting": betting_lower,
}
ANYTIME_BOUNDS = frozenset({"betting"})
"""Bounds that stay valid when they are looked at after every batch; all others need their n fixed beforehand."""


def mean_lower(scores: ArrayLike, alpha: float, *, bound: str = "betting") -> Array:
    """Return the named level-`alpha` lower bound of the mean of scores [n, ...] along axis 0.

    Raises:
        UserError: the bound has another name than hoeffding, bernstein, kl or betting.

    Example:
        >>> round(float(mean_lower([0.9] * 100, 0.001)), 3)
        0.821
    """
    if bound not in LOWER_BOUNDS:
        raise UserError(f"there is no confidence bound '{bound}': {nearest(bound, LOWER_BOUNDS)}")
    return LOWER_BOUNDS[bound](as_scores(scores), alpha)


class FixedSample:
    """Collects exactly `n` scores; bounds can be read only when all `n` are there, and nothing can be added after.

    A fixed-n bound that is looked at repeatedly until it is good enough is invalid. Here the number is fixed at
    construction, an early look is refused, and so is a late addition. Failed passes are added as NaN and count as 0.

    Example:
        >>> sample = FixedSample(4)
        >>> sample.add([0.9, 0.8])
        >>> sample.lower(0.05, bound="hoeffding")
        Traceback (most recent call last):
        robustvlm.errors.UserError: a fixed-n bound was planned for 4 samples and only 2 are there...
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise UserError(f"a sample needs at least one value, got n = {n}")
        self.n = n
        self._parts: list[Array] = []
        self._count = 0

    def add(self, scores: ArrayLike) -> None:
        """Add scores [m, ...] along axis 0.

        Raises:
            UserError: there would be more than the planned `n`.
        """
        x = as_scores(scores)
        if self._count + len(x) > self.n:
            raise UserError(f"the sample was planned for {self.n} scores and would get {self._count + len(x)}")
        self._parts.append(x)
        self._count += len(x)

    @property
    def scores(self) -> Array:
        """The scores [n, ...].

        Raises:
            UserError: not all `n` scores are there yet.
        """
        if self._count < self.n:
            raise UserError(
                f"a fixed-n bound was planned for {self.n} samples and only {self._count} are there: collect the "
                "rest, or use the betting bound, which may be looked at any time"
            )
        return np.concatenate(self._parts, axis=0)

    def lower(self, alpha: float, *, bound: str) -> Array:
        """Return the named lower bound of the mean; see `mean_lower`."""
        return mean_lower(self.scores, alpha, bound=bound)

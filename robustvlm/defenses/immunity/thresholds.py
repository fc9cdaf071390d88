"""Phase 4, thresholds: a Weibull fit of each class's lowest scores says below which score a known image is unlikely."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy.stats import kstest, weibull_min

from robustvlm.errors import UserError

DEFAULT_MISS = 0.05
MIN_IMAGES = 30
TAIL = 0.5
"""Share of a class's scores, the lowest, that the Weibull is fitted to (our reading: the paper leaves it open)."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TailFit:
    """The lower tail of scores: P(S < s) = tail exp(-((cutoff - s) / scale)^shape) for s below the cutoff.

    Attributes:
        distance, p_value: Kolmogorov-Smirnov, of the tail from its fit. The fit saw the same scores, so that a small
            p-value speaks against it and a large one says little.
        images: scores behind the fit, tail or not.
    """

    cutoff: float
    shape: float
    scale: float
    tail: float
    images: int
    distance: float
    p_value: float

    def threshold(self, miss: float) -> float:
        """Return the score below which a known image lies with probability `miss`.

        Raises:
            UserError: `miss` is not between 0 and the share of the tail.

        Example:
            >>> round(TailFit(0.5, 1.0, 0.1, 0.5, 100, 0.0, 1.0).threshold(0.05), 4)
            0.2697
        """
        if not 0.0 < miss < self.tail:
            raise UserError(f"--miss must lie between 0 and {self.tail:g} (the share of the tail), got {miss:g}")
        return self.cutoff - self.scale * (-math.log(miss / self.tail)) ** (1.0 / self.shape)


@dataclass(frozen=True)
class ClassThreshold:
    """The threshold of one class, the fit behind it, and whether it is that of all classes together."""

    value: float
    images: int
    pooled: bool
    fit: TailFit | None


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of all classes, and the pooled fit that stands in where a class has too few images."""

    classes: tuple[ClassThreshold, ...]
    pooled: TailFit
    miss: float

    @property
    def values(self) -> Array:
        """The thresholds, [K]."""
        return np.array([found.value for found in self.classes])


def fit_tail(scores: ArrayLike, *, tail: float = TAIL) -> TailFit:
    """Return the Weibull fit (maximum likelihood, SciPy) of how far the lowest scores lie below the `tail` quantile.

    Extreme-value theory: the lower tail of a score with a lower bound is of the Weibull type; Immuno-VLM
    (arXiv 2605.30745), phase 4. Equal scores, which no Weibull fits, give a tail of no width.

    Raises:
        UserError: fewer than two scores, or scores that are not finite.

    Example:
        >>> import numpy as np
        >>> scores = np.random.default_rng(0).normal(size=5000)
        >>> round(fit_tail(scores).threshold(0.05), 1)  # the normal quantile is -1.645
        -1.6
    """
    values = np.sort(np.asarray(scores, dtype=np.float64))
    if len(values) < 2 or not np.isfinite(values).all():
        raise UserError(f"a tail needs at least 2 finite scores, got {len(values)}")
    cutoff = float(np.quantile(values, tail))
    below = cutoff - values[values < cutoff]
    if len(below) < 2 or below.max() - below.min() < 1e-12:
        return TailFit(cutoff, 1.0, 0.0, tail, len(values), 0.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search may try shapes that overflow
        shape, _, scale = weibull_min.fit(below, floc=0.0)
    test = kstest(below, weibull_min(shape, scale=scale).cdf)
    return TailFit(cutoff, float(shape), float(scale), tail, len(values), float(test.statistic), float(test.pvalue))


def fit_thresholds(
    scores: ArrayLike,
    classes: Sequence[int] | npt.NDArray[np.int64],
    count: int,
    *,
    miss: float = DEFAULT_MISS,
    min_images: int = MIN_IMAGES,
) -> Thresholds:
    """Return the threshold of each of `count` classes; classes with fewer than `min_images` images get the pooled one.

    Args:
        scores: S_DIS of held-out images that are classified right, [N]. classes: their class, [N].
        miss: probability that a known image is rejected.

    Raises:
        UserError: fewer than two scores in all, or `miss` out of range.

    Example:
        >>> import numpy as np
        >>> scores = np.random.default_rng(0).normal(size=200)
        >>> found = fit_thresholds(scores, np.repeat([0, 1], [190, 10]), 2)
        >>> [item.pooled for item in found.classes]
        [False, True]
    """
    values, of = np.asarray(scores, dtype=np.float64), np.asarray(classes, dtype=np.int64)
    if len(values) < 2:
        raise UserError(
            f"thresholds need at least 2 held-out images that are classified right, got {len(values)}: "
            "pass more with --held-out"
        )
    pooled = fit_tail(values)
    fallback = pooled.threshold(miss)
    found = []
    for k in range(count):
        own = values[of == k]
        if len(own) < min_images:
            found.append(ClassThreshold(fallback, len(own), True, None))
        else:
            fit = fit_tail(own)
            found.append(ClassThreshold(fit.threshold(miss), len(own), False, fit))
    return Thresholds(tuple(found), pooled, miss)

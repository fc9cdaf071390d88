"""Phase 4, thresholds: below which score a known image is unlikely, from a Weibull fit of the lowest scores.

What is fitted is a class's own scores (equal miss for all classes), all scores together (one threshold), own scores and
for classes with too few of them what the names around it say (density), or what lets in the fewest stand-ins of unknown
images at the same total miss (least-fpr).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy.stats import kstest, weibull_min
from torch import Tensor

from robustvlm.errors import UserError, nearest

DEFAULT_MISS = 0.05
MIN_IMAGES = 30
TAIL = 0.5
"""Largest share of the scores, the lowest, that the Weibull is fitted to (our reading: the paper leaves it open)."""
LEAST_TAIL, TAIL_IMAGES = 0.2, 20
RULES = ("equal-miss", "density", "pooled", "least-fpr")
NEIGHBOURS = 10
_LEAST_CLASSES = 8

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
    """The threshold of one class, the fit behind it, and whether it is that of all classes together.

    `by_density` says that it was told from the names around the class's own.
    """

    value: float
    images: int
    pooled: bool
    fit: TailFit | None
    by_density: bool = False


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


def tail_share(images: int, miss: float) -> float:
    """Return the share of the scores that is their tail: a fifth, of few images the 20 lowest, a half at most.

    OpenMax fits the 20 most extreme; a fit of the lower half is one of the middle. A miss of more than a tenth asks for
    twice its share, so that the threshold lies inside the tail.

    Example:
        >>> [tail_share(images, 0.05) for images in (30, 80, 1000)], tail_share(1000, 0.2)
        ([0.5, 0.25, 0.2], 0.4)
    """
    return max(min(TAIL, max(LEAST_TAIL, TAIL_IMAGES / max(1, images))), min(2 * miss, 0.98))


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
    rule: str = "equal-miss",
    tail: float | None = None,
    density: Array | None = None,
    strangers: tuple[Array, npt.NDArray[np.int64]] | None = None,
) -> Thresholds:
    """Return the threshold of each of `count` classes; classes with fewer than `min_images` images get the pooled one.

    Args:
        scores: those of held-out images that are classified right, [N]. classes: their class, [N].
        miss: probability that a known image is rejected.
        rule: one of `RULES`. tail: share that is fitted to; None: see `tail_share`.
        density: for "density", how near other names are to each class's, [K] (`name_density`).
        strangers: for "least-fpr", scores and nearest classes of stand-ins for unknown images, [M] each.

    Raises:
        UserError: fewer than two scores in all, `miss` out of range, or an unknown rule.

    Example:
        >>> import numpy as np
        >>> scores = np.random.default_rng(0).normal(size=200)
        >>> found = fit_thresholds(scores, np.repeat([0, 1], [190, 10]), 2)
        >>> [item.pooled for item in found.classes]
        [False, True]
    """
    values, of = np.asarray(scores, dtype=np.float64), np.asarray(classes, dtype=np.int64)
    if rule not in RULES:
        raise UserError(f"unknown --thresholds '{rule}': {nearest(rule, RULES)}")
    if len(values) < 2:
        raise UserError(
            f"thresholds need at least 2 held-out images that are classified right, got {len(values)}: "
            "pass more with --held-out"
        )

    def fitted(part: Array) -> TailFit:
        return fit_tail(part, tail=tail_share(len(part), miss) if tail is None else tail)

    pooled = fitted(values)
    fallback = pooled.threshold(miss)
    if rule == "least-fpr":
        images = np.bincount(of, minlength=count)
        # Classes with few images share one threshold: number `count` stands for all of them.
        group = np.where(images >= min_images, np.arange(count), count)
        scored, near = strangers or (np.zeros(0), np.zeros(0, dtype=np.int64))
        lowest = _least_accepted(values, group[of], miss, scored, group[near])
        return Thresholds(
            tuple(
                ClassThreshold(lowest.get(int(group[k]), fallback), int(images[k]), bool(group[k] == count), None)
                for k in range(count)
            ),
            pooled,
            miss,
        )
    found = []
    for k in range(count):
        own = values[of == k]
        if len(own) < min_images or rule == "pooled":
            found.append(ClassThreshold(fallback, len(own), True, None))
        else:
            fit = fitted(own)
            found.append(ClassThreshold(fit.threshold(miss), len(own), False, fit))
    if rule == "density" and density is not None:
        found = _told_by_density(found, density)
    return Thresholds(tuple(found), pooled, miss)


# Thresholds of classes with few images, from the names around theirs


def name_density(text: Tensor, neighbours: int = NEIGHBOURS) -> Array:
    """Return the mean cosine of each unit text embedding [K, D] to its nearest others (ten of them, where there are).

    Example:
        >>> import torch
        >>> name_density(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), 1).round(2).tolist()
        [0.6, 0.8, 0.8]
    """
    cosines = (text.double() @ text.double().T).fill_diagonal_(-2.0)
    return np.asarray(cosines.topk(max(1, min(neighbours, len(text) - 1)), dim=1).values.mean(dim=1).numpy())


def _told_by_density(found: list[ClassThreshold], density: Array) -> list[ClassThreshold]:
    """Fit thresholds to density by a line over the classes with a fit of their own; all stay where these are too few.

    A name amid many others has images between classes, so that the scores of its class lie otherwise than those of a
    name apart. The line is not followed beyond the thresholds that it was fitted to.
    """
    own = [k for k, item in enumerate(found) if item.fit is not None]
    if len(own) < _LEAST_CLASSES or np.ptp(density[own]) < 1e-9:
        return found
    values = np.array([found[k].value for k in own])
    slope, offset = np.polyfit(density[own], values, 1)
    told = np.clip(offset + slope * density, values.min(), values.max())
    return [
        item if item.fit is not None else ClassThreshold(float(told[k]), item.images, False, None, True)
        for k, item in enumerate(found)
    ]


# Thresholds that let in the fewest stand-ins of unknown images at a given total miss


def _least_accepted(
    values: Array, of: npt.NDArray[np.int64], miss: float, strange: Array, near: npt.NDArray[np.int64]
) -> dict[int, float]:
    """Return, by class, thresholds that accept the fewest strangers while at most a share `miss` of scores is rejected.

    Each class has a staircase of known images lost for strangers refused. The best choice of one stair in every class
    within the budget of lost images is found exactly, class by class (a knapsack).
    """
    budget = int(miss * len(values) + 1e-9)
    refused = np.zeros(budget + 1, dtype=np.int64)  # the most with at most so many images lost, over the classes so far
    chosen: list[tuple[int, list[tuple[int, int, float]], npt.NDArray[np.int64]]] = []
    for k in map(int, np.unique(of)):
        stairs = [stair for stair in _staircase(values[of == k], strange[near == k]) if stair[0] <= budget]
        most, which = np.full(budget + 1, -1), np.zeros(budget + 1, dtype=np.int64)
        for number, (lost, more, _) in enumerate(stairs):
            found = refused[: budget + 1 - lost] + more
            better = found > most[lost:]
            most[lost:][better], which[lost:][better] = found[better], number
        refused = most
        chosen.append((k, stairs, which))
    left, cuts = int(refused.argmax()), {}
    for k, stairs, which in reversed(chosen):
        lost, _, cuts[k] = stairs[which[left]]
        left -= lost
    return cuts


def _staircase(known: Array, strange: Array) -> list[tuple[int, int, float]]:
    """Return the cuts that are worth their loss: known images lost, strangers refused, threshold.

    The first, below every known image, loses none: scores are compared with thresholds in float32.
    """
    scores = np.unique(known)  # equal scores are lost together
    below = float(np.nextafter(np.float32(scores[0]), np.float32(-np.inf)))
    stairs = [(0, int((strange <= below).sum()), below)]
    for cut in scores:
        refused = int((strange <= cut).sum())
        if refused > stairs[-1][1]:
            stairs.append((int((known <= cut).sum()), refused, float(cut)))
    return stairs

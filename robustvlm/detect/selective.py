"""Selective answers: from which score on a prediction is given, so that answers are right as often as was promised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robustvlm.errors import UserError

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
_BEGIN = (0.125, 0.25, 0.5, 1.0)
"""Share of the looks that a walk leaves out: where its first test stands."""


@dataclass(frozen=True)
class Promise:
    """Thresholds above which a prediction is an answer, and what was promised of the answers.

    Attributes:
        level: answers are right with at least this probability, in every class with a threshold below infinity,
        confidence: with this probability over the draw of the calibration images, for all of these classes at once.
        thresholds: one for each predicted class, or one for all; infinity: never answered.
    """

    level: float
    confidence: float
    thresholds: tuple[float, ...]

    def answered(self, scores: Sequence[float] | Array, said: Sequence[int] | Labels) -> npt.NDArray[np.bool_]:
        """Return which predictions [N], of classes `said` [N] at `scores` [N], are answers.

        Example:
            >>> Promise(0.9, 0.95, (0.5, math.inf)).answered([0.7, 0.4, 0.9], [0, 0, 1]).tolist()
            [True, False, False]
        """
        least = np.asarray(self.thresholds)
        least = least[0] if len(least) == 1 else least[np.asarray(said)]
        # Infinite scores too: of a class without a threshold nothing is promised.
        return np.asarray((np.asarray(scores, dtype=np.float64) >= least) & (least < np.inf))


def promise(
    scores: Sequence[float] | Array,
    said: Sequence[int] | Labels,
    right: Sequence[bool] | npt.NDArray[np.bool_],
    *,
    level: float,
    confidence: float = 0.95,
    classes: int | None = None,
    looks: tuple[Sequence[float] | Array, Sequence[int] | Labels] | None = None,
) -> Promise:
    """Return the lowest thresholds at which the answers are right with probability `level`, as far as images show.

    Every second image, or those of `looks`, say at which scores to look; the others test there the hypothesis that
    answers from this score on are right less often than `level`, by an exact binomial test. Looks go from large scores
    to small, and the first test that is not rejected ends the walk (fixed-sequence testing, which costs nothing for
    many looks: Angelopoulos et al. 2021, arXiv 2110.01052; for one rule Geifman and El-Yaniv 2017, arXiv 1705.08500).
    Looking at the scores of the images that test would be no fixed sequence. Four walks begin where an eighth, a
    quarter, half and all of the images would be answered, so that one early miss does not end all; they and the classes
    share 1 - confidence (Bonferroni), so that all promises hold together.

    The promise is for images drawn as the calibration images were, and for answers as a whole: nothing is promised of
    other images, nor under attack.

    Args:
        scores, said, right: of calibration images [N] that nothing was learnt from: any score, higher = surer; the
            predicted class; whether it is the image's.
        level, confidence: see `Promise`.
        classes: how many classes there are, for a threshold each; None: one threshold for all.
        looks: scores and predictions of other images, whose labels nobody needs to know; then every calibration image
            tests, and thresholds are lower.

    Raises:
        UserError: numbers that are no probabilities, no images, or scores that are not numbers.

    Example:
        >>> sure = [0.9] * 150 + [0.2] * 100
        >>> promise(sure, [0] * 250, [True] * 150 + [False] * 100, level=0.9).thresholds
        (0.9,)
    """
    values, hits, predicted = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool), np.asarray(said)
    if not 0 < level < 1 or not 0 < confidence < 1:
        raise UserError(f"level and confidence must lie between 0 and 1, got {level:g} and {confidence:g}")
    if not len(values) or np.isnan(values).any() or not len(values) == len(hits) == len(predicted):
        raise UserError(f"a promise needs scores, predictions and hits of the same images, got {len(values)} scores")
    groups = [np.ones(len(values), dtype=bool)] if classes is None else [predicted == k for k in range(classes)]
    risk = (1 - confidence) / len(groups)
    found = []
    for k, own in enumerate(groups):
        if looks is None:
            places, tested, truth = values[own][::2], values[own][1::2], hits[own][1::2]
        else:
            other = np.asarray(looks[0], dtype=np.float64)
            places, tested, truth = (
                other if classes is None else other[np.asarray(looks[1]) == k],
                values[own],
                hits[own],
            )
        found.append(_threshold(places, tested, truth, level, risk))
    return Promise(level, confidence, tuple(found))


def _threshold(places: Array, tested: Array, right: npt.NDArray[np.bool_], level: float, risk: float) -> float:
    """Return the lowest score that a walk reached, every test on its way rejected; infinity where none began.

    `places` and what is tested are of different images, so that the sequence of tests is fixed beforehand.
    """
    from scipy.stats import binom

    ranked = np.sort(places)[::-1]
    found = math.inf
    for share in _BEGIN if len(ranked) else ():
        for threshold in np.unique(ranked[max(0, math.ceil(share * len(ranked)) - 1) :])[::-1]:
            answered = tested >= threshold
            # P(as many right or more) if answers are right with probability `level`: a worse rule shows it more rarely.
            if binom.sf(right[answered].sum() - 1, answered.sum(), level) > risk / len(_BEGIN):
                break
            found = min(found, float(threshold))
    return found

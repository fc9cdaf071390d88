"""How well a score tells known from unknown images, with intervals; ties are handled exactly.

Known images are the positives and have the higher scores. All metrics are read off one curve: thresholds at the
distinct scores, descending, where everything with a score at or above the threshold is accepted. Images may carry
weights, so that a bootstrap sample is a matter of counts (`weighted_metrics`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError

# How well a score tells known from unknown images: AUROC, FPR at a TPR, average precision; ties handled exactly

Array = npt.NDArray[np.float64]

METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")
TPR = 0.95
_SLACK = 1e-9  # a share of counts such as 0.95 * 20 must not miss its whole number by rounding


@dataclass(frozen=True, eq=False)
class Metrics:
    """One value per row of weights [B]: AUROC, FPR at 95% TPR, average precision of known and of unknown images."""

    auroc: Array
    fpr95: Array
    aupr_in: Array
    aupr_out: Array


def auroc(known: npt.ArrayLike, unknown: npt.ArrayLike) -> float:
    """Return the chance that a known image scores above an unknown one, ties counted half.

    Example:
        >>> auroc([3.0, 2.0], [2.0, 1.0])
        0.875
    """
    return float(all_metrics(known, unknown).auroc[0])


def fpr_at_tpr(known: npt.ArrayLike, unknown: npt.ArrayLike, tpr: float = TPR) -> float:
    """Return the share of unknown images accepted at the highest threshold that accepts `tpr` of the known ones.

    Example:
        >>> fpr_at_tpr([4.0, 3.0, 2.0, 1.0], [2.5, 0.0], tpr=0.75)
        0.5
    """
    _, others = checked_scores(known, unknown)
    return float((others >= threshold_at_tpr(known, tpr)).mean())


def threshold_at_tpr(known: npt.ArrayLike, tpr: float = TPR) -> float:
    """Return the highest threshold at which at least `tpr` of the known images score at or above it.

    Example:
        >>> threshold_at_tpr([4.0, 3.0, 2.0, 1.0], 0.75)
        2.0
    """
    if not 0 < tpr <= 1:
        raise UserError(f"the true positive rate must be above 0 and at most 1, got {tpr}: pass for example 0.95")
    scores = _finite(known, "known")
    return float(np.sort(scores)[::-1][math.ceil(tpr * len(scores) - _SLACK) - 1])


def average_precision(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Return the area under the precision-recall curve as a sum of steps, without interpolation between points.

    For unknown images as positives (AUPR-out) pass negated scores.

    Example:
        >>> average_precision([2.0], [1.0]), average_precision([1.0], [2.0])
        (1.0, 0.5)
    """
    return float(all_metrics(positive, negative).aupr_in[0])


def all_metrics(known: npt.ArrayLike, unknown: npt.ArrayLike) -> Metrics:
    """Return all metrics of two sets of scores, each as an array of one value."""
    high, low = checked_scores(known, unknown)
    return weighted_metrics(high, low, np.ones((1, len(high))), np.ones((1, len(low))))


def weighted_metrics(known: Array, unknown: Array, known_weights: Array, unknown_weights: Array) -> Metrics:
    """Return all metrics under each of B weightings: scores [n] and [m], weights [B, n] and [B, m].

    Weights are not negative, and each row has a positive sum on both sides.
    """
    scores = np.concatenate([known, unknown])
    distinct, place = np.unique(-scores, return_inverse=True)  # ascending in -score: thresholds from high to low
    hits = _per_threshold(known_weights, place[: len(known)], len(distinct))
    alarms = _per_threshold(unknown_weights, place[len(known) :], len(distinct))
    true, false = hits.cumsum(axis=1), alarms.cumsum(axis=1)
    positives, negatives = true[:, -1:], false[:, -1:]
    # Known images ranked strictly above each unknown one, and half of those at the same score.
    above = (alarms * (true - 0.5 * hits)).sum(axis=1) / (positives * negatives)[:, 0]
    reached = (true >= TPR * positives - _SLACK).argmax(axis=1)
    rows = np.arange(len(reached))
    return Metrics(
        auroc=above,
        fpr95=false[rows, reached] / negatives[:, 0],
        aupr_in=_steps(hits, true, false) / positives[:, 0],
        aupr_out=_steps(alarms, negatives - false + alarms, positives - true + hits) / negatives[:, 0],
    )


def roc_points(known: npt.ArrayLike, unknown: npt.ArrayLike) -> tuple[Array, Array]:
    """Return false and true positive rates at every threshold, from (0, 0) to (1, 1).

    Example:
        >>> [list(map(float, rates)) for rates in roc_points([2.0], [1.0])]
        [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    high, low = checked_scores(known, unknown)
    thresholds = np.unique(np.concatenate([high, low]))[::-1]
    accepted = [1 - np.searchsorted(np.sort(side), thresholds) / len(side) for side in (low, high)]
    false, true = (np.concatenate([[0.0], rates]) for rates in accepted)
    return false, true


def _per_threshold(weights: Array, place: npt.NDArray[np.int64], count: int) -> Array:
    """Return the weight at each distinct score, [B, n] -> [B, count]."""
    order = np.argsort(place, kind="stable")
    at, starts = np.unique(place[order], return_index=True)
    total = np.zeros((len(weights), count))
    total[:, at] = np.add.reduceat(weights[:, order], starts, axis=1)
    return total


def _steps(weight: Array, positive: Array, negative: Array) -> Array:
    """Return the sum over thresholds of weight times precision; a threshold that accepts nothing counts nothing."""
    total = positive + negative
    precision = np.divide(positive, total, out=np.zeros_like(total), where=total > 0)
    return (weight * precision).sum(axis=1)


def checked_scores(known: npt.ArrayLike, unknown: npt.ArrayLike) -> tuple[Array, Array]:
    """Return both sets of scores as arrays [n] and [m]; UserError where one is empty, of another shape or has NaN."""
    return _finite(known, "known"), _finite(unknown, "unknown")


def _finite(scores: npt.ArrayLike, which: str) -> Array:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"metrics need scores of at least one {which} image, got an array of shape {list(array.shape)}")
    if np.isnan(array).any():
        raise UserError(f"{int(np.isnan(array).sum())} scores of {which} images are NaN: leave those images out")
    return array


# Uncertainty of detection metrics: DeLong's interval of an AUROC, and a bootstrap shared by all scores.
#
# Images may come in groups that are no independent evidence, such as several copies of one drawing. The variance is
# then that of groups (Obuchowski 1997), and the bootstrap draws groups.

# Weights of so many images are in memory at once: 32 MB in float64.
_CHUNK = 2**22


@dataclass(frozen=True)
class Interval:
    """A number with its two-sided confidence interval; `method` says how that was made."""

    value: float
    low: float
    high: float
    method: str


def auroc_interval(
    known: npt.ArrayLike,
    unknown: npt.ArrayLike,
    *,
    known_groups: Sequence[str] | None = None,
    unknown_groups: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return the AUROC with DeLong's interval, made on the log-odds of the AUROC so that it stays in [0, 1].

    With complete separation the estimated variance is 0; the interval then is that of min(n, m) disjoint pairs, all of
    them in the right order (exact binomial).

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988), by midranks as Sun and Xu 2014; groups: Obuchowski,
    Biometrics 53 (1997). No group may hold both known and unknown images.

    Example:
        >>> found = auroc_interval([3.0, 2.5, 2.0, 1.0], [2.2, 1.5, 0.5, 0.2])
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (0.8125, 0.329, 0.975)
    """
    high, low = checked_scores(known, unknown)
    value = auroc(high, low)
    z = float(ndtri(0.5 + confidence / 2))
    sizes = [_group_count(groups, len(side)) for groups, side in ((known_groups, high), (unknown_groups, low))]
    variance = math.fsum(
        _variance(part, groups)
        for part, groups in zip(placements(high, low), (known_groups, unknown_groups), strict=True)
    )
    if not 0 < value < 1 or variance <= 0:
        return _separated(value, min(sizes), confidence)
    centre, reach = math.log(value / (1 - value)), z * math.sqrt(variance) / (value * (1 - value))
    return Interval(value, _sigmoid(centre - reach), _sigmoid(centre + reach), "DeLong")


def placements(known: Array, unknown: Array) -> tuple[Array, Array]:
    """Return, for each known image, the share of unknown ones below it, and for each unknown one that of known above.

    Ties count half; the mean of either is the AUROC.

    Example:
        >>> [list(map(float, part)) for part in placements(np.array([2.0, 1.0]), np.array([1.0]))]
        [[1.0, 0.5], [0.75]]
    """
    from scipy.stats import rankdata  # not at import: it takes over a second, and only detection needs it

    n, m = len(known), len(unknown)
    together = rankdata(np.concatenate([known, unknown]))
    return (together[:n] - rankdata(known)) / m, 1 - (together[n:] - rankdata(unknown)) / n


class Bootstrap:
    """Bootstrap samples of one pair of image sets, the same for every score, so that scores can be compared in pairs.

    Known and unknown images are drawn apart, each with replacement, groups as wholes.

    Args:
        known_groups, unknown_groups: the group of every image; images that stand alone have a name of their own.
        n_draws: bootstrap samples; seed: of the draws.

    Example:
        >>> draws = Bootstrap(["a", "b", "c"], ["x", "y"], n_draws=200, seed=0)
        >>> found = draws.intervals([3.0, 2.0, 1.0], [1.5, 0.0])["auroc"]
        >>> round(found.low, 3), round(found.value, 3), found.high
        (0.333, 0.833, 1.0)
    """

    def __init__(
        self, known_groups: Sequence[str], unknown_groups: Sequence[str], *, n_draws: int = 1000, seed: int = 0
    ) -> None:
        self.n_draws = n_draws
        self._known = _Groups(known_groups, derive_seed(seed, "bootstrap", "known"))
        self._unknown = _Groups(unknown_groups, derive_seed(seed, "bootstrap", "unknown"))

    def draws(self, known: npt.ArrayLike, unknown: npt.ArrayLike) -> dict[str, Array]:
        """Return every metric under every bootstrap sample, each [n_draws]."""
        high, low = checked_scores(known, unknown)
        rows = max(1, _CHUNK // (len(high) + len(low)))
        parts = [
            weighted_metrics(high, low, first, second)
            for first, second in zip(
                self._known.weights(self.n_draws, rows), self._unknown.weights(self.n_draws, rows), strict=True
            )
        ]
        return {name: np.concatenate([getattr(part, name) for part in parts]) for name in METRICS}

    def intervals(self, known: npt.ArrayLike, unknown: npt.ArrayLike, confidence: float = 0.95) -> dict[str, Interval]:
        """Return every metric with its percentile interval."""
        high, low = checked_scores(known, unknown)
        point = weighted_metrics(high, low, np.ones((1, len(high))), np.ones((1, len(low))))
        return intervals_of(point, self.draws(high, low), confidence)


def intervals_of(point: Metrics, draws: dict[str, Array], confidence: float = 0.95) -> dict[str, Interval]:
    """Return percentile intervals from bootstrap draws, around the metrics of the images themselves."""
    ends = [50 * (1 - confidence), 50 * (1 + confidence)]
    found = {}
    for name in METRICS:
        low, high = np.percentile(draws[name], ends)
        found[name] = Interval(float(getattr(point, name)[0]), float(low), float(high), "bootstrap")
    return found


@dataclass(frozen=True)
class Difference:
    """How much larger a metric is for one score than for another on the same images, with a two-sided p-value."""

    value: float
    low: float
    high: float
    p_value: float


def difference(value: float, draws: Array, confidence: float = 0.95) -> Difference:
    """Return a difference `value` with percentile interval and p-value from its paired bootstrap draws [n].

    The p-value is twice the smaller share of draws on either side of zero, the observed difference counted as one
    more draw on each (Davison and Hinkley 1997, section 4.2.3), so it is never 0.

    Example:
        >>> difference(0.1, np.full(99, 0.1)).p_value
        0.02
    """
    low, high = np.percentile(draws, [50 * (1 - confidence), 50 * (1 + confidence)])
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * (side + 1) / (len(draws) + 1)))


class _Groups:
    """Draws of groups with replacement, as counts per image."""

    def __init__(self, groups: Sequence[str], seed: int) -> None:
        self.names, self.of_image = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
        self.seed = seed

    def weights(self, n_draws: int, rows: int) -> Iterator[Array]:
        """Yield weights [rows, images] until there are `n_draws` rows; they do not depend on `rows`."""
        draws, count = np.random.default_rng(self.seed), len(self.names)
        for start in range(0, n_draws, rows):
            size = min(rows, n_draws - start)
            counts = draws.multinomial(count, np.full(count, 1 / count), size=size)
            yield counts[:, self.of_image].astype(np.float64)


def _variance(parts: Array, groups: Sequence[str] | None) -> float:
    """Return the variance that one side's placements [n] give the AUROC, groups counted as wholes."""
    centred = parts - parts.mean()
    if groups is not None:
        centred = np.bincount(np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1], centred)
    count = len(centred)
    if count < 2:
        return 0.0
    return float(count / (count - 1) * np.square(centred).sum() / len(parts) ** 2)


def _group_count(groups: Sequence[str] | None, images: int) -> int:
    return images if groups is None else len(set(groups))


def _separated(value: float, pairs: int, confidence: float) -> Interval:
    """Return the interval where the variance says nothing: complete separation, or a single image."""
    end = ((1 - confidence) / 2) ** (1 / pairs)
    if value == 1.0:
        return Interval(value, end, 1.0, "exact")
    return Interval(value, 0.0, 1.0 - end if value == 0.0 else 1.0, "exact")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

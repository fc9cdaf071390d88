"""Rates with exact intervals, means, and exact paired tests: every proportion the program shows comes from here."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

# scipy and statsmodels are imported where they are used: with pandas and scipy.stats behind it, statsmodels costs a
# start two seconds.

CLOPPER_PEARSON = "Clopper-Pearson"
_ROUNDING = 1e-9


class Rate(BaseModel):
    """A proportion `successes / total` with its two-sided confidence interval `[low, high]`.

    With nothing counted (`total` 0) there is no value, and the interval is all of [0, 1].

    Example:
        >>> Rate(successes=0, total=0, value=None, low=0.0, high=1.0).value is None
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    successes: int
    total: int
    value: float | None
    low: float
    high: float
    confidence: float = 0.95
    method: str = CLOPPER_PEARSON


def rate(
    successes: int, total: int, confidence: float = 0.95, *, independent: float | None = None, each: str = "group"
) -> Rate:
    """Return `successes / total` with its exact binomial interval, which covers the true rate at least at `confidence`.

    Args:
        independent: how many independent cases all of them are worth (`worth_of`), where copies of one thing are among
            them: the interval is that of so many. each: what the interval then counts once.

    Raises ValueError unless 0 <= successes <= total and 0 < confidence < 1.
    Source: Clopper and Pearson, Biometrika 26 (1934), equal-tailed, by statsmodels.

    Example:
        >>> r = rate(8, 10)
        >>> (r.value, round(r.low, 4), round(r.high, 4))
        (0.8, 0.4439, 0.9748)
    """
    if not 0 <= successes <= total:
        raise ValueError(f"need 0 <= successes <= total, got {successes} of {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    if total == 0:
        return Rate(successes=0, total=0, value=None, low=0.0, high=1.0, confidence=confidence)
    if independent is not None and independent < total:
        return _each_once(successes, total, independent, confidence, each)
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, total, alpha=1 - confidence, method="beta")
    return Rate(
        successes=int(successes),
        total=int(total),
        value=successes / total,
        low=float(low),
        high=float(high),
        confidence=confidence,
    )


def _each_once(successes: int, total: int, independent: float, confidence: float, each: str) -> Rate:
    """Return a share with the interval that `independent` cases would have of which the same share are successes."""
    from scipy.special import betaincinv

    share, tail = successes / total, (1 - confidence) / 2
    hits = share * independent
    return Rate(
        successes=int(successes),
        total=int(total),
        value=share,
        low=float(betaincinv(hits, independent - hits + 1, tail)) if successes else 0.0,
        high=float(betaincinv(hits + 1, independent - hits, 1 - tail)) if successes < total else 1.0,
        confidence=confidence,
        method=f"{CLOPPER_PEARSON}, each {each} once",
    )


def worth_of(groups: Iterable[Hashable]) -> float:
    """Return how many independent cases so many are worth whose groups are no independent evidence within.

    (sum n)^2 / sum n^2 of the sizes of the groups, Kish's effective size where cases of a group are all alike: the
    number of groups where they are equally large, and less where they are not.

    Source: Kish, Survey Sampling (1965), section 8.2.

    Example:
        >>> worth_of("aabbcc"), worth_of("abc"), round(worth_of("aaaabc"), 2)
        (3.0, 3.0, 2.0)
    """
    sizes = Counter(groups).values()
    return sum(sizes) ** 2 / max(1, sum(size**2 for size in sizes))


class Mean(BaseModel):
    """A mean of `total` numbers with its two-sided confidence interval; no interval for fewer than two numbers.

    Example:
        >>> Mean(total=0, value=None, low=None, high=None).method
        "Student's t"
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: int
    value: float | None
    low: float | None
    high: float | None
    confidence: float = 0.95
    method: str = "Student's t"


def mean(
    values: Sequence[float],
    confidence: float = 0.95,
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    independent: float | None = None,
) -> Mean:
    """Return the mean of `values` with Student's t interval, which takes the mean's own spread to be about normal.

    Args:
        within: the least and the largest that a value can be. The interval ends there: the mean that is sought lies
            inside, so that what is cut off costs no coverage.
        independent: how many independent cases the values are worth, as for `rate`.

    Example:
        >>> m = mean([0.1, 0.2, 0.3])
        >>> (round(m.value, 3), round(m.low, 3), round(m.high, 3))
        (0.2, -0.048, 0.448)
        >>> mean([0.1, 0.2, 0.3], within=(0.0, 1.0)).low
        0.0
    """
    n = len(values)
    if n == 0:
        return Mean(total=0, value=None, low=None, high=None, confidence=confidence)
    centre = math.fsum(values) / n
    worth = n if independent is None else min(n, independent)
    if worth < 2:
        return Mean(total=n, value=centre, low=None, high=None, confidence=confidence)
    from scipy.special import stdtrit

    # Of groups of copies the spread of all values is that between groups, of which there are `worth`.
    spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / n / (worth - 1))
    reach = float(stdtrit(worth - 1, 0.5 + confidence / 2)) * spread
    # The mean itself may be past an end by rounding, as the cosine of a feature to itself is.
    low, high = min(centre, max(within[0], centre - reach)), max(centre, min(within[1], centre + reach))
    return Mean(total=n, value=centre, low=low, high=high, confidence=confidence)


def mean_share(values: Sequence[float], confidence: float = 0.95, *, independent: float | None = None) -> Mean:
    """Return the mean of shares in [0, 1], one a case, with its interval: Student's t, within [0, 1].

    Cases that are 0 or 1 each are counted, and have the exact interval of a rate: where all are alike their spread is
    no measure of how far the mean may be off.

    Example:
        >>> m = mean_share([1.0] * 10)
        >>> (m.value, round(m.low, 4), m.high, m.method)
        (1.0, 0.6915, 1.0, 'Clopper-Pearson')
        >>> mean_share([0.5, 1.0]).method
        "Student's t"
    """
    # Sums of weights miss 1 by rounding.
    snapped = [round(value) if abs(value - round(value)) < _ROUNDING else value for value in values]
    if not snapped or any(value not in (0, 1) for value in snapped):
        return mean(snapped, confidence, within=(0.0, 1.0), independent=independent)
    found = rate(int(sum(snapped)), len(snapped), confidence, independent=independent)
    return Mean(total=found.total, value=found.value, low=found.low, high=found.high,
                confidence=confidence, method=found.method)  # fmt: skip


class PairedTest(BaseModel):
    """Two yes/no outcomes of the same cases, cross-counted, with the p-value of "both are equally often yes".

    `things`: how many things differ, of which the p-value is, where there are copies of things; else None.

    Example:
        >>> mcnemar_exact([True, True, False], [True, False, False]).only_first
        1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    things: int | None = None

    @property
    def total(self) -> int:
        """Number of cases compared."""
        return self.both + self.only_first + self.only_second + self.neither


def mcnemar_exact(
    first: Sequence[bool], second: Sequence[bool], *, groups: Sequence[Hashable] | None = None
) -> PairedTest:
    """Test whether two systems succeed equally often on the same cases; `first[i]` and `second[i]` are case i.

    Only the discordant cases carry evidence: under the null they split as a fair coin. Where copies of one thing are
    among the cases, `groups[i]` says of which thing case i is a copy: only groups then are independent, and it is their
    differences whose signs are fair coins (Fisher's randomisation test of paired differences; of groups of one it is
    McNemar's). That is exact where the systems could be exchanged in every group, and about right where they are
    equally often right but differ in how their successes cluster. The counts are of cases in either form.

    Raises ValueError when the lengths differ. Source: McNemar, Psychometrika 12 (1947), in its exact (binomial) form,
    two-sided, by statsmodels; Fisher, The Design of Experiments (1935), section 21.

    Example:
        >>> mcnemar_exact([True] * 6, [False] * 6).p_value
        0.03125
        >>> mcnemar_exact([True] * 6, [False] * 6, groups="aabbcc").p_value
        0.25
    """
    lengths = {len(first), len(second), len(first if groups is None else groups)}
    if len(lengths) > 1:
        raise ValueError(f"paired outcomes must have one length, got {' and '.join(map(str, sorted(lengths)))}")
    pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    ahead: Counter[Hashable] = Counter()
    for group, (a, b) in zip(range(len(pairs)) if groups is None else groups, pairs, strict=True):
        ahead[group] += a - b
    differ = [lead for lead in ahead.values() if lead]
    return PairedTest(
        both=pairs.count((True, True)),
        only_first=pairs.count((True, False)),
        only_second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
        p_value=_by_signs(differ),
        things=None if len(ahead) == len(pairs) else len(differ),
    )


def _by_signs(differences: Sequence[int]) -> float:
    """Return the chance that whole numbers of these sizes, their signs fair coins, sum to as much either way."""
    import numpy as np
    from scipy.stats import binom
    from statsmodels.stats.contingency_tables import mcnemar

    sizes = Counter(map(abs, differences))
    if len(sizes) < 2:
        more = sum(lead > 0 for lead in differences)
        # The doubled binomial tail passes 1 when they split evenly.
        return min(1.0, float(mcnemar([[0, more], [len(differences) - more, 0]], exact=True).pvalue))
    sums = np.ones(1)  # of every sum from -reach to reach by steps of two, what its chance is
    for size, count in sizes.items():
        chances = binom.pmf(np.arange(count + 1), count, 0.5)
        wider = np.zeros(len(sums) + size * count)
        for place, chance in enumerate(chances):
            wider[place * size : place * size + len(sums)] += chance * sums
        sums = wider
    reach = sum(map(abs, differences))
    found = np.arange(-reach, reach + 1, 2)
    return min(1.0, float(np.sort(sums[np.abs(found) >= abs(sum(differences))]).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for having been tested together, in the order given; none in, none out.

    Rejecting those at or below a level keeps the chance of any false rejection in the family at that level.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979), by statsmodels.

    Example:
        >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]

"""Charts and rankings of an attack run, and the per-image numbers behind them."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from robustvlm.commands.attack.record import words_of
from robustvlm.commands.attack.summary import GroupSummary, Summary
from robustvlm.commands.attack.verdicts import Rows, columns
from robustvlm.report.charts import BAD, DASHES, GOOD, INK, SERIES, as_svg, chart, legend, new_figure, whole_numbers
from robustvlm.report.words import Bar, bar, bounds, count_of, percent, plain, sentence
from robustvlm.stats import Rate, rate

# The per-image numbers behind the histograms, taken from the result rows


@dataclass(frozen=True)
class Margins:
    """Logit margins (true class minus best other) of the images that were right when clean, pairwise."""

    clean: tuple[float, ...]
    attacked: tuple[float, ...]


def margins(rows: Rows, eps: float) -> Margins:
    """Return each image's margin unperturbed and its smallest under any attack inside the ball of size `eps`.

    Example:
        >>> row = {"image_id": "a", "eps": 0.1, "outcome": "fooled", "clean_margin": 2.0, "margin": -0.5}
        >>> margins([row], 0.1)
        Margins(clean=(2.0,), attacked=(-0.5,))
    """
    clean: dict[str, float] = {}
    worst: dict[str, float] = {}
    for image_id, radius, outcome, before, after in columns(
        rows, "image_id", "eps", "outcome", "clean_margin", "margin"
    ):
        if radius > eps or outcome not in ("fooled", "robust") or not (_finite(before) and _finite(after)):
            continue
        clean[image_id] = before
        worst[image_id] = min(after, worst.get(image_id, after))
    return Margins(tuple(clean.values()), tuple(worst.values()))


def steps_to_success(rows: Rows) -> dict[float, list[int]]:
    """Return, per eps, the gradient steps of each attack that fooled an image.

    Example:
        >>> steps_to_success([{"eps": 0.1, "outcome": "fooled", "steps": 3}])
        {0.1: [3]}
    """
    steps: dict[float, list[int]] = defaultdict(list)
    for eps, outcome, taken in columns(rows, "eps", "outcome", "steps"):
        if outcome == "fooled":
            steps[eps].append(taken)
    return dict(sorted(steps.items()))


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# Charts of attacks: accuracy over eps, margins before and under attack, and the steps that successes took

RIGHT = "still right"


@dataclass(frozen=True)
class Curve:
    """The share of images on which the goal is not reached (accuracy, mostly) over eps; at eps 0 without attack.

    `most` holds what the rates are at most, of a run that stopped early; none otherwise. `held` names the share.
    """

    name: str
    eps: tuple[float, ...]
    ticks: tuple[str, ...]
    rates: tuple[Rate, ...]
    most: tuple[Rate, ...] = ()
    held: str = RIGHT


def curve_of(summary: Summary, name: str) -> Curve:
    """Return the curve of a run: the same share at eps 0 and at every radius.

    Where a model may refuse, that is "right or no answer", of which clean accuracy is a part.
    """
    points = summary.per_eps
    clean, clean_most = _unperturbed(summary)
    words = words_of(summary)
    return Curve(
        name=name,
        eps=(0.0, *(at.eps for at in points)),
        ticks=("0", *(plain(at.eps_text, 20) for at in points)),
        rates=(clean, *(at.robust_accuracy for at in points)),
        most=(
            clean_most,
            *(at.robust_accuracy_at_most or at.robust_accuracy for at in points),
        )
        if summary.unfinished
        else (),
        held=RIGHT if words.accuracy else words.held,
    )


def held_by(curves: Sequence[Curve]) -> str:
    """Return what the curves of a chart are shares of."""
    names = {curve.held for curve in curves}
    return names.pop() if len(names) == 1 else "goal not reached"


def _unperturbed(summary: Summary) -> tuple[Rate, Rate]:
    """Return the share of images on which the goal is not reached without an attack, and what it is at most."""
    images = summary.images
    if images.exposed in (None, images.clean_correct):
        return summary.clean_accuracy, summary.clean_accuracy_at_most or summary.clean_accuracy
    total, exposed = images.evaluated + images.waiting, images.exposed or 0
    worth = None if images.worth_in_all is None else max(1.0, images.worth_in_all)
    return rate(exposed, total, independent=worth), rate(exposed + images.waiting, total, independent=worth)


_CHARACTER = 0.019
"""Of the axis: what a character of a label takes up."""


def uncrowded(ticks: Mapping[float, str]) -> list[str]:
    """Return the labels of ascending ticks; one is left blank that would run into the first or one on its right.

    More than six stand at an angle, where the lines and not the lengths have to keep apart.

    Example:
        >>> uncrowded({0.0: "0", 0.05: "0.05/255", 0.25: "0.25/255", 0.5: "0.5/255", 1.0: "1/255"})
        ['0', '', '0.25/255', '0.5/255', '1/255']
    """
    first, *places = ticks
    span = max([first, *places]) - first

    def clear(left: float, right: float) -> bool:
        characters = 3.0 if len(ticks) > 6 else (len(ticks[left]) + len(ticks[right])) / 2 + 1
        return right - left >= characters * _CHARACTER * span

    shown = [first]
    for place in reversed(places):
        if len(shown) == 1 or (clear(first, place) and clear(place, shown[-1])):
            shown.append(place)
    return [label if place in shown else "" for place, label in ticks.items()]


@chart
def security_curve(curves: Sequence[Curve], *, key: str, norm: str) -> Markup:
    """Draw robust accuracy over eps with its 95 % band, one line per run."""
    figure, axes = new_figure()
    for i, curve in enumerate(curves):
        colour = SERIES[i % len(SERIES)]
        most = curve.most or curve.rates
        points = [(e, r, m) for e, r, m in zip(curve.eps, curve.rates, most, strict=True) if r.value is not None]
        x = [e for e, _, _ in points]
        low, high = [100 * r.low for _, r, _ in points], [100 * m.high for _, _, m in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(
            x,
            [100 * (r.value or 0) for _, r, _ in points],
            color=colour,
            marker="o",
            ms=4.5,
            lw=1.8,
            ls=DASHES[i % len(DASHES)],
            label=curve.name,
        )
    ticks = dict(sorted((e, t) for curve in curves for e, t in zip(curve.eps, curve.ticks, strict=True)))
    labels = uncrowded(ticks)
    axes.set_xticks(list(ticks), labels, rotation=35 if sum(map(bool, labels)) > 6 else 0)
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"perturbation size ε ({norm})")
    axes.set_ylabel(f"{plain(held_by(curves), 40)}, % of images")
    if len(curves) > 1:
        legend(figure)
    alt = "; ".join(
        f"{curve.name}: "
        + ", ".join(
            f"{t}: {percent(r.value) if m.value == r.value else bounds(r, m)}"
            for t, r, m in zip(curve.ticks, curve.rates, curve.most or curve.rates, strict=True)
        )
        for curve in curves
    )
    what = "Accuracy" if held_by(curves) == RIGHT else sentence(plain(held_by(curves), 80))
    return as_svg(figure, key=key, alt=f"{what} against perturbation size. {alt}.")


@chart
def margin_histogram(margins: Margins, *, key: str, accuracy: bool = True) -> Markup:
    """Draw the margins before and under attack over common bins; left of zero the goal is reached.

    Args:
        accuracy: the goal is any wrong class, so that its margin is that of the true one.
    """
    clean, attacked = np.asarray(margins.clean), np.asarray(margins.attacked)
    figure, axes = new_figure()
    bins = _bins_with_zero(np.concatenate([clean, attacked]))
    axes.hist(clean, bins, color=GOOD, alpha=0.55, label="unperturbed")
    axes.hist(attacked, bins, color=BAD, alpha=0.55, label="under attack")
    axes.axvline(0, color=INK, lw=1, ls="--")
    of_class, of_goal = "margin of the true class (logits); below 0: wrong", "distance from the goal; below 0: reached"
    axes.set_xlabel(of_class if accuracy else of_goal)
    axes.set_ylabel("images")
    whole_numbers(axes.yaxis)
    legend(figure)
    below = int((attacked < 0).sum())
    alt = (
        f"Margins of {count_of(len(clean), 'images')}: median {np.median(clean):.2f} unperturbed,"
        f" {np.median(attacked):.2f} under attack, {below} below zero."
    )
    return as_svg(figure, key=key, alt=alt)


def _bins_with_zero(values: npt.NDArray[np.float64]) -> list[float]:
    """Return about 30 equal bins over the values; zero is an edge, so that no bar mixes right and wrong."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    width = (high - low) / 28 or 1.0
    # Margins that are all zero, as of a head that was never trained, get one bar of their own.
    last = max(np.ceil(high / width), np.floor(low / width) + 1)
    return (width * np.arange(np.floor(low / width), last + 1)).tolist()


@chart
def steps_histogram(steps: Mapping[float, Sequence[int]], names: Mapping[float, str], *, key: str) -> Markup:
    """Draw how many gradient steps the successful attacks needed, stacked by eps."""
    every = [s for values in steps.values() for s in values]
    figure, axes = new_figure()
    top = max(every)
    width = max(1, -(-(top + 1) // 30))
    bins = np.arange(-0.5, top + width + 0.5, width).tolist()
    bottom = np.zeros(len(bins) - 1)
    for i, (eps, values) in enumerate(steps.items()):
        counts = np.histogram(values, bins)[0]
        # One hue, stronger for larger eps: the order of the parts is then visible without a legend.
        axes.bar(
            np.asarray(bins[:-1]) + width / 2, counts, 0.9 * width, bottom,
            color=SERIES[0], alpha=(i + 1) / len(steps), label=names[eps], lw=0,
        )  # fmt: skip
        bottom += counts
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("gradient steps until the answer changed")
    axes.set_ylabel("images")
    if len(steps) > 1:
        legend(figure, title="ε =")
    alt = f"Steps to success of {len(every)} attacks: median {np.median(every):g}, largest {top}."
    return as_svg(figure, key=key, alt=alt)


def ranked(groups: Sequence[GroupSummary]) -> list[GroupSummary]:
    """Return the groups with attacked images, most often fooled first; among equals, more evidence lies at the ends."""
    attacked = [group for group in groups if group.attack_success_rate.total]

    def key(group: GroupSummary) -> tuple[float, float, float, str]:
        rate = group.attack_success_rate
        return -(rate.value or 0.0), -rate.low, -rate.high, group.name

    return sorted(attacked, key=key)


def bars(groups: Sequence[GroupSummary]) -> list[Bar]:
    """Return one bar per group, in the order given."""
    return [bar(group.name, group.attack_success_rate) for group in groups]


@dataclass(frozen=True)
class Ranking:
    """The two ends of a long ranking; a short one has all its bars in `worst`."""

    worst: list[Bar]
    best: list[Bar]
    total: int
    always: int
    never: int


def ranking(groups: Sequence[GroupSummary], *, ends: int = 10) -> Ranking:
    """Return all groups when they are few, else the `ends` most and the `ends` least often fooled."""
    order = ranked(groups)
    short = len(order) <= 2 * ends + 4
    values = [group.attack_success_rate.value for group in order]
    return Ranking(
        worst=bars(order if short else order[:ends]),
        best=[] if short else bars(order[-ends:]),
        total=len(order),
        always=values.count(1.0),
        never=values.count(0.0),
    )


@dataclass(frozen=True)
class GroupRow:
    """A class with its counts and its rate at every eps."""

    name: str
    images: int
    clean_correct: int
    rates: list[Rate]


def group_rows(summary: Summary) -> list[GroupRow]:
    """Return all classes, in the order of the ranking at the largest eps, with their rates at every eps."""
    if not summary.per_eps:
        return []
    by_eps = [{group.name: group for group in at.per_class} for at in summary.per_eps]
    order = sorted(
        summary.per_eps[-1].per_class,
        key=lambda g: (-1.0 if g.attack_success_rate.value is None else -g.attack_success_rate.value, g.name),
    )
    return [
        GroupRow(
            name=group.name,
            images=group.images,
            clean_correct=group.clean_correct,
            rates=[groups[group.name].attack_success_rate for groups in by_eps],
        )
        for group in order
    ]

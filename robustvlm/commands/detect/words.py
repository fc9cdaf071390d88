"""The findings of a detect run in plain words and in charts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from robustvlm.commands.detect.summary import AttackedScore, DetectSummary, OnSet, ScoreSummary, WordsSummary
from robustvlm.detect import BASELINES
from robustvlm.detect.metrics import roc_points
from robustvlm.report.charts import DASHES, INK, MUTED, SERIES, as_svg, chart, legend, new_figure, whole_numbers
from robustvlm.report.words import ball, percent, plain

NEEDS = {"images": "images", "words": "words", "encoder": ""}


def needs(score: ScoreSummary) -> str:
    """Say what a score needs besides the model, in one or two words."""
    return ", ".join(word for need in score.needs if (word := NEEDS.get(need, need)))


def versus(on: OnSet, titles: dict[str, str]) -> str:
    """Say how a score compares with the best other baseline on a set."""
    if on.versus is None:
        return "no other baseline"
    baseline = titles.get(on.versus.baseline, on.versus.baseline)
    gap, p = on.versus.difference, on.versus.p_holm
    sign = "+" if gap >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(gap):.3f} to {baseline}, p\N{NO-BREAK SPACE}{'<0.001' if p < 0.001 else f'{p:.3f}'}"


def verdict(summary: DetectSummary) -> str:
    """Say in one sentence which score has the highest AUROC, by which count, and how well it tells.

    On several sets it is the highest mean, which need not be the highest on any of them: the sentence says so.
    """
    best = next(score for score in summary.scores if score.name == summary.best)
    parts = [
        f"{plain(on.unknown, 40)} {on.auroc.value:.3f} (accepting {percent(on.fpr95.value)} of the unknown images)"
        for on in best.on
    ]
    tail = f"AUROC {', '.join(parts)} at 95% of the known accepted."
    title = f"The{best.title[3:]}" if best.title.startswith("the ") else best.title
    if len(best.on) == 1:
        return f"{title} has the highest AUROC: {tail}"
    mean = sum(on.auroc.value for on in best.on) / len(best.on)
    first = f"{title} has the highest mean AUROC over the {len(best.on)} sets, {mean:.3f}: {tail}"
    higher = []
    for place, on in enumerate(best.on):
        top = max(summary.scores, key=lambda score: score.on[place].auroc.value)
        if top.on[place].auroc.value > on.auroc.value:
            higher.append(f"{top.title} on {plain(on.unknown, 40)}, {top.on[place].auroc.value:.3f}")
    return f"{first} Higher on a set of its own: {'; '.join(higher)}." if higher else first


def comparison(summary: DetectSummary) -> str:
    """Say on how many sets the best score beats the best baseline that is another score beyond chance."""
    best = next(score for score in summary.scores if score.name == summary.best)
    compared = [on.versus for on in best.on if on.versus is not None]
    if not compared:
        return "There is no other baseline to compare it with."
    better = sum(found.p_holm < 0.05 and found.difference > 0 for found in compared)
    titles = {score.name: score.title for score in summary.scores}
    rivals = ", ".join(dict.fromkeys(titles.get(found.baseline, found.baseline) for found in compared))
    own = "It is a usual baseline itself; it" if best.name in BASELINES else "It"
    sets = "the set" if len(compared) == 1 else f"{better} of the {len(compared)} sets"
    beats = "beats" if better else "does not beat"
    where = f"on {sets}" if better or len(compared) == 1 else "on any set"
    return (
        f"{own} {beats} the best other baseline ({rivals}) beyond chance {where} (paired bootstrap, 5% level, "
        "adjusted for the number of scores)."
    )


def tone(summary: DetectSummary) -> str:
    """Return the colour class of the verdict: "held" (green), "" (red) or "neutral".

    Red: on some set the best score's interval reaches down to chance, or it accepts more than half of the unknown
    images. Green: on every set it accepts less than a tenth, by the upper end of the interval, and no check warns.
    """
    best = next(score for score in summary.scores if score.name == summary.best)
    if any(on.auroc.low <= 0.5 or on.fpr95.value > 0.5 for on in best.on):
        return ""
    warned = any(check.level in ("fault", "warning") for check in summary.checks)
    return "held" if not warned and all(on.fpr95.high < 0.1 for on in best.on) else "neutral"


def oracle_titles(summary: DetectSummary) -> list[str]:
    """Return the titles of scores that use words, or negative prompts, naming what they are tested on."""
    told = {need for need, found, _ in _texts(summary) if found.oracle}
    return [score.title for score in summary.scores if told.intersection(score.needs)]


def words_sentence(summary: DetectSummary) -> str | None:
    """Say what became of the texts that name classes of unknown sets; None where no score uses any."""
    said = []
    for need, found, what in _texts(summary):
        if found.oracle:
            titles = [score.title for score in summary.scores if need in score.needs]
            said.append(
                f"Oracle: {', '.join(titles)} use {len(found.naming)} {what} that name classes of the unknown sets "
                "(--oracle-words): what they reach is no measure of what they would reach."
            )
        else:
            left = f"{len(found.naming)} {what} that name classes of the unknown sets were left out"
            said.append(f"{left}; {found.used:,} were used.")
    return " ".join(said) or None


def _texts(summary: DetectSummary) -> list[tuple[str, WordsSummary, str]]:
    """Return the texts that name classes of unknown sets: what scores need, the texts, what they are called."""
    pairs = (("words", summary.words, "words"), ("negatives", summary.negatives, "negative prompts"))
    return [(need, found, what) for need, found, what in pairs if found is not None and found.naming]


def own_sentence(summary: DetectSummary) -> str | None:
    """Say what a model that may refuse decides by itself."""
    if summary.own is None:
        return None
    accepted = ", ".join(
        f"{percent(rate.value)} of {plain(name, 40)}" for name, rate in summary.own.accepted_unknown.items()
    )
    return (
        f"At its own threshold the model accepts {percent(summary.own.accepted_known.value)} of the known images "
        f"({percent(summary.own.right.value)} with the right class), and of the unknown ones {accepted}."
    )


def attack_sentence(summary: DetectSummary) -> str | None:
    """Say what attacks did to the score that held best."""
    if not summary.attacked or summary.norm is None or summary.eps_text is None:
        return None
    best = max(summary.attacked, key=_held)
    sets = ", ".join(f"{on.auroc_both.value:.3f} on {plain(on.unknown, 40)}" for on in best.on)
    return (
        f"{ball(summary.norm, summary.eps_text)}, made by somebody who knows the score: of the scores attacked "
        f"{best.title} holds best, with an AUROC of {sets} when known and unknown images are attacked."
    )


def _held(score: AttackedScore) -> float:
    return sum(on.auroc_both.value for on in score.on) / max(1, len(score.on))


# Charts: AUROC of every score, ROC curves, and how the scores of known and unknown images lie

Array = NDArray[np.float64]
_MARKERS = "osD^v"
# Points of a drawn ROC curve at most: a page does not get better by more.
_POINTS = 400


@dataclass(frozen=True, eq=False)
class Curve:
    """One score on one set: its name and the scores of known and unknown images."""

    name: str
    known: Array
    unknown: Array


@chart
def auroc_chart(scores: Sequence[ScoreSummary], sets: Sequence[str], *, key: str) -> Markup:
    """Draw the AUROC of every score with its interval, a colour and marker per set of unknown images."""
    figure, axes = new_figure((6.4, 0.9 + 0.31 * len(scores)))
    rows = np.arange(len(scores))[::-1]
    for i, name in enumerate(sets):
        at = [next(on for on in score.on if on.unknown == name).auroc for score in scores]
        values = np.array([value.value for value in at])
        reach = np.abs(np.array([[value.low for value in at], [value.high for value in at]]) - values)
        shift = 0.18 * (len(sets) - 1) / 2 - 0.18 * i
        axes.errorbar(
            values, rows + shift, xerr=reach, fmt=_MARKERS[i % len(_MARKERS)], ms=4.5, lw=1.2,
            color=SERIES[i % len(SERIES)], label=name,
        )  # fmt: skip
    axes.set_yticks(rows, [score.title for score in scores])
    axes.set_ylim(-0.6, len(scores) - 0.4)
    low = min(on.auroc.low for score in scores for on in score.on)
    axes.set_xlim(min(0.45, low - 0.02), 1.005)
    axes.axvline(0.5, color=MUTED, lw=0.8, ls=":")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("AUROC, 95% interval (0.5: no better than chance)")
    legend(figure, columns=3)
    best = max(scores, key=lambda score: sum(on.auroc.value for on in score.on))
    reached = ", ".join(f"{on.unknown} {on.auroc.value:.3f}" for on in best.on)
    return as_svg(figure, key=key, alt=f"AUROC of every score. Highest mean: {best.title}, {reached}.")


@chart
def roc_chart(curves: Sequence[Curve], *, key: str, unknown: str) -> Markup:
    """Draw ROC curves of some scores on one set, with the line at 95% of the known images."""
    figure, axes = new_figure()
    for i, curve in enumerate(curves):
        false, true = _thinned(*roc_points(curve.known, curve.unknown))
        axes.plot(false, true, color=SERIES[i % len(SERIES)], ls=DASHES[i % len(DASHES)], lw=1.6, label=curve.name)
    axes.axhline(0.95, color=INK, lw=0.8, ls=":")
    axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel(f"unknown images accepted ({unknown})")
    axes.set_ylabel("known images accepted")
    legend(figure, columns=3)
    return as_svg(figure, key=key, alt=f"ROC curves on {unknown}: {', '.join(curve.name for curve in curves)}.")


@chart
def histogram(known: Array, unknown: Sequence[tuple[str, Array]], threshold: float, *, key: str, title: str) -> Markup:
    """Draw the distribution of a score over known and unknown images, as shares, with the threshold."""
    figure, axes = new_figure()
    every = np.concatenate([known, *(values for _, values in unknown)])
    # A few far outliers, as distances have, must not press all the rest into one bar.
    low, high = np.percentile(every, [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1.0, 31)
    for i, (name, values) in enumerate([("known", known), *unknown]):
        shares = np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0] / len(values)
        axes.stairs(100 * shares, bins, color=SERIES[i % len(SERIES)], lw=1.6, label=name, fill=False)
        axes.stairs(100 * shares, bins, color=SERIES[i % len(SERIES)], alpha=0.15, fill=True)
    if bins[0] <= threshold <= bins[-1]:
        axes.axvline(threshold, color=INK, lw=1, ls="--")
    whole_numbers(axes.yaxis)
    axes.set_xlabel(f"{title} (accepted right of the line)")
    axes.set_ylabel("% of images")
    legend(figure, columns=3)
    medians = ", ".join(f"{name} {np.median(values):.3g}" for name, values in [("known", known), *unknown])
    return as_svg(figure, key=key, alt=f"Distribution of {title}; medians: {medians}; threshold {threshold:.3g}.")


def _thinned(false: Array, true: Array) -> tuple[Array, Array]:
    if len(false) <= _POINTS:
        return false, true
    keep = np.unique(np.linspace(0, len(false) - 1, _POINTS).round().astype(int))
    return false[keep], true[keep]

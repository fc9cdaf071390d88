"""Charts of detection: AUROC of every score, ROC curves, and how the scores of known and unknown images lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from robustvlm.commands.detect.summary import ScoreSummary
from robustvlm.detect.metrics import roc_points
from robustvlm.report.charts import DASHES, INK, MUTED, SERIES, STYLE, as_svg, chart, legend, new_figure

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
    with mpl.rc_context(STYLE):
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
    with mpl.rc_context(STYLE):
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
    with mpl.rc_context(STYLE):
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
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
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

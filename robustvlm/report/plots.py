"""Charts as inline SVG: text stays text, colours are the page's CSS variables, the same input gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from robustvlm.report.series import Margins
from robustvlm.stats import Rate

# Matplotlib wants literal colours; these stand-ins are replaced by the page's variables, so that charts follow
# the reader's light or dark scheme.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--grid)",
    "#040404": "var(--good)",
    "#050505": "var(--bad)",
    **{f"#0600{i:02x}": f"var(--series-{i})" for i in range(6)},
}
INK, MUTED, GRID, GOOD, BAD, *SERIES = _VARIABLES

_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
}
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Curve:
    """Accuracy against eps of one run: the first point is the unperturbed accuracy, at eps 0."""

    name: str
    eps: tuple[float, ...]
    ticks: tuple[str, ...]
    rates: tuple[Rate, ...]


def security_curve(curves: Sequence[Curve], *, key: str, norm: str) -> Markup:
    """Draw robust accuracy over eps with its 95 % band, one line per run."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        for i, curve in enumerate(curves):
            colour = SERIES[i % len(SERIES)]
            points = [(e, r) for e, r in zip(curve.eps, curve.rates, strict=True) if r.value is not None]
            x = [e for e, _ in points]
            axes.fill_between(
                x, [100 * r.low for _, r in points], [100 * r.high for _, r in points], color=colour, alpha=0.18, lw=0
            )
            axes.plot(
                x,
                [100 * (r.value or 0) for _, r in points],
                color=colour,
                marker="o",
                ms=4.5,
                lw=1.8,
                ls=_DASHES[i % len(_DASHES)],
                label=curve.name,
            )
        ticks = dict(sorted((e, t) for curve in curves for e, t in zip(curve.eps, curve.ticks, strict=True)))
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=35 if len(ticks) > 6 else 0)
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"perturbation size ε ({norm})")
        axes.set_ylabel("still right, % of images")
        if len(curves) > 1:
            _legend(figure)
        alt = "; ".join(
            f"{curve.name}: "
            + ", ".join(f"{t}: {100 * (r.value or 0):.1f}%" for t, r in zip(curve.ticks, curve.rates, strict=True))
            for curve in curves
        )
        return _svg(figure, key=key, alt=f"Accuracy against perturbation size. {alt}.")


def margin_histogram(margins: Margins, *, key: str) -> Markup:
    """Draw the margins before and under attack over common bins; left of zero the model is wrong."""
    clean, attacked = np.asarray(margins.clean), np.asarray(margins.attacked)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        bins = _bins_with_zero(np.concatenate([clean, attacked]))
        axes.hist(clean, bins, color=GOOD, alpha=0.55, label="unperturbed")
        axes.hist(attacked, bins, color=BAD, alpha=0.55, label="under attack")
        axes.axvline(0, color=INK, lw=1, ls="--")
        axes.set_xlabel("margin of the true class (logits); below 0: wrong")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure)
        below = int((attacked < 0).sum())
        alt = (
            f"Margins of {len(clean)} images: median {np.median(clean):.2f} unperturbed,"
            f" {np.median(attacked):.2f} under attack, {below} below zero."
        )
        return _svg(figure, key=key, alt=alt)


def _bins_with_zero(values: npt.NDArray[np.float64]) -> list[float]:
    """Return about 30 equal bins over the values; zero is an edge, so that no bar mixes right and wrong."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    width = (high - low) / 28 or 1.0
    return (width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)).tolist()


def steps_histogram(steps: Mapping[float, Sequence[int]], names: Mapping[float, str], *, key: str) -> Markup:
    """Draw how many gradient steps the successful attacks needed, stacked by eps."""
    every = [s for values in steps.values() for s in values]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("gradient steps until the answer changed")
        axes.set_ylabel("images")
        if len(steps) > 1:
            _legend(figure, title="ε =")
        alt = f"Steps to success of {len(every)} attacks: median {np.median(every):g}, largest {top}."
        return _svg(figure, key=key, alt=alt)


# Characters that a row of the legend has room for; a column takes about five beside its label's.
_LEGEND_WIDTH = 66


def _figure() -> tuple[Figure, Axes]:
    # Narrow on purpose: at this width the text is still readable when a phone scales the chart down.
    figure = Figure(figsize=(4.8, 3.1), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=3)
    return figure, axes


def _legend(figure: Figure, *, title: str | None = None) -> None:
    """Put the legend above the axes, where it hides no data, in as many rows as its words need."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if title:
        handles, labels = [Patch(alpha=0), *handles], [title, *labels]
    columns = max(1, min(6, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 5)))
    figure.legend(handles, labels, loc="outside upper right", ncols=columns, handlelength=1.2, borderpad=0)


def _svg(figure: Figure, *, key: str, alt: str) -> Markup:
    """Return the figure as an SVG element for a page that holds several: ids carry `key`, nothing points outside."""
    buffer = io.StringIO()
    # The salt fixes the ids; it is read while saving.
    with mpl.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style element inside an inline SVG would reach the whole page; the page's own sheet says the same for charts.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'id="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text).replace("url(#", f"url(#{key}-")
    text = re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match.group()], text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    opening = f'<svg class="chart" role="img" aria-label="{escape(alt)}" {box.group()}>'
    return Markup(opening + f"<title>{escape(alt)}</title>" + text[text.index(">") + 1 :])

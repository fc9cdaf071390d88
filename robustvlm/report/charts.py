"""What every chart is drawn on, and the charts of a training.

Text stays text, colours are the page's CSS variables, the same input gives the same bytes. A chart that cannot be drawn
says so in its place: no picture is worth a finished run's report.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from markupsafe import Markup

from robustvlm.report.words import percent
from robustvlm.stats import Mean, Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# What every chart is drawn on: colours, figure, legend, and the way to inline SVG

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

STYLE: Any = {
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
DASHES = ("-", "--", "-.", ":")
# Narrow on purpose: at this width the text is still readable when a phone scales the chart down.
_SIZE = (4.8, 3.1)
# Characters that a row of the legend has room for; a column takes about five beside its label's.
_LEGEND_WIDTH = 66


_P = ParamSpec("_P")


def chart(draw: Callable[_P, Markup]) -> Callable[_P, Markup]:
    """Draw in the style of the page; return a line of text where the numbers are such that drawing fails.

    Example:
        >>> @chart
        ... def largest(values): return Markup(max(values))
        >>> largest([])
        Markup('<p class="small">This chart could not be drawn: ...</p>')
    """

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Markup:
        try:
            from matplotlib import rc_context  # not at import: a run draws at its end, if at all

            # What matplotlib and numpy have to say of odd numbers is nothing for the terminal of a finished run.
            with warnings.catch_warnings(), np.errstate(all="ignore"), rc_context(STYLE):
                warnings.simplefilter("ignore")
                return draw(*args, **kwargs)
        except (
            Exception
        ) as error:  # whatever a drawing library may raise, the report's numbers are more than its charts
            return Markup('<p class="small">This chart could not be drawn: {}.</p>').format(str(error) or repr(error))

    return drawn


def new_figure(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    """Return an empty chart of `size` (width and height in inches), on the page's own ground."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=3)
    return figure, axes


def whole_numbers(axis: Axis, *, most: int = 10) -> None:
    """Put ticks at whole numbers alone, and no more than so many."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=most))


def legend(figure: Figure, *, title: str | None = None, columns: int | None = None) -> None:
    """Put the legend above the axes, where it hides no data.

    Args:
        title: words in front of the entries.
        columns: entries in a row at most, from the left; None for as many as their words have room for, on the right.
    """
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if not labels:
        return
    if title:
        from matplotlib.patches import Patch

        handles, labels = [Patch(alpha=0), *handles], [title, *labels]
    style: dict[str, Any] = {"loc": "outside upper left", "handlelength": 1.6, "columnspacing": 1.4}
    if columns is None:
        columns = max(1, min(6, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 5)))
        style = {"loc": "outside upper right", "handlelength": 1.2}
    figure.legend(handles, labels, ncols=columns, borderpad=0, **style)


def as_svg(figure: Figure, *, key: str, alt: str) -> Markup:
    """Return the figure as an SVG element for a page that holds several: ids carry `key`, nothing points outside."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The salt fixes the ids; it is read while saving.
    with rc_context({"svg.hashsalt": key}):
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


@dataclass(frozen=True)
class Line:
    """Values over distances: `values` in [-1, 1] for cosines, or `rates` with bands for shares of images."""

    name: str
    eps: tuple[float, ...]
    values: tuple[float, ...] = ()
    rates: tuple[Rate, ...] = ()


# Charts of a training: loss terms, accuracies with their bands, and norms by level, over the steps

Points = Sequence[tuple[int, float]]


@chart
def loss_curves(terms: Mapping[str, Points], *, key: str) -> Markup:
    """Draw every term of the loss over the steps, one line each."""
    figure, axes = new_figure()
    for i, (name, points) in enumerate(terms.items()):
        colour, dash = SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]
        axes.plot([s for s, _ in points], [v for _, v in points], color=colour, ls=dash, lw=1.5, label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("mean since the point before")
    whole_numbers(axes.xaxis, most=6)
    if len(terms) > 1:
        legend(figure)
    ends = "; ".join(f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in terms.items())
    return as_svg(figure, key=key, alt=f"Terms of the loss over the steps. {ends}.")


@chart
def rate_curves(rates: Mapping[str, Sequence[tuple[int, Rate]]], *, key: str, kept: int | None) -> Markup:
    """Draw rates over the steps with their 95 % bands, and mark the step whose weights were kept."""
    figure, axes = new_figure()
    for i, (name, points) in enumerate(rates.items()):
        colour, steps = SERIES[i % len(SERIES)], [step for step, _ in points]
        low, high = ([100 * getattr(rate, end) for _, rate in points] for end in ("low", "high"))
        if i < 2:  # bands of more lines would cover each other
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
        values = [100 * (rate.value or 0.0) for _, rate in points]
        axes.plot(steps, values, color=colour, ls=DASHES[i % len(DASHES)], marker="o", ms=3, lw=1.6, label=name)
    if kept is not None:
        axes.axvline(kept, color=INK, lw=0.9, ls=":")
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("% of the validation images")
    whole_numbers(axes.xaxis, most=6)
    legend(figure)
    ends = "; ".join(
        f"{name}: {percent(points[0][1].value or 0.0)} to {percent(points[-1][1].value or 0.0)}"
        for name, points in rates.items()
    )
    return as_svg(figure, key=key, alt=f"Validation over the steps. {ends}.")


@chart
def mean_curves(means: Mapping[str, Sequence[tuple[int, Mean]]], *, key: str) -> Markup:
    """Draw means over the steps with their 95 % bands, one line each."""
    figure, axes = new_figure()
    for i, (name, points) in enumerate(means.items()):
        colour, steps = SERIES[i % len(SERIES)], [step for step, _ in points]
        values = [mean.value or 0.0 for _, mean in points]
        low = [mean.low for _, mean in points if mean.low is not None]
        high = [mean.high for _, mean in points if mean.high is not None]
        if len(low) == len(high) == len(points):
            axes.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        axes.plot(steps, values, color=colour, ls=DASHES[i % len(DASHES)], marker="o", ms=3, lw=1.6, label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("mean of the validation images")
    whole_numbers(axes.xaxis, most=6)
    legend(figure)
    ends = "; ".join(f"{name}: {points[0][1].value} to {points[-1][1].value}" for name, points in means.items())
    return as_svg(figure, key=key, alt=f"Means over the steps. {ends}.")


@chart
def level_norms(before: Mapping[int, float], after: Mapping[int, float], *, key: str) -> Markup:
    """Draw a quantity by level of the tree, the root on the left, before training and of the kept weights."""
    figure, axes = new_figure()
    for i, (name, norms) in enumerate((("before", before), ("kept weights", after))):
        levels = sorted(norms, reverse=True)
        axes.plot(levels, [norms[level] for level in levels], color=SERIES[i], marker="o", ms=4.5, lw=1.8, label=name)
    axes.invert_xaxis()
    axes.set_xlabel("level (0: the classes)")
    axes.set_ylabel("mean norm in the ball")
    whole_numbers(axes.xaxis)
    legend(figure)
    shown = ", ".join(f"level {level}: {after[level]:.3f}" for level in sorted(after, reverse=True))
    return as_svg(figure, key=key, alt=f"Mean norm by level, from the root to the classes. {shown}.")

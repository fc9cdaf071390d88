"""What every chart is drawn on: colours, figure, legend, and the way to inline SVG.

Text stays text, colours are the page's CSS variables, the same input gives the same bytes. A chart that cannot be drawn
says so in its place: no picture is worth a finished run's report.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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
    """Let a drawing function return a line of text where the numbers are such that it fails.

    Example:
        >>> @chart
        ... def largest(values): return Markup(max(values))
        >>> largest([])
        Markup('<p class="small">This chart could not be drawn: ...</p>')
    """

    @wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Markup:
        try:
            # What matplotlib and numpy have to say of odd numbers is nothing for the terminal of a finished run.
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                return draw(*args, **kwargs)
        except (
            Exception
        ) as error:  # whatever a drawing library may raise, the report's numbers are more than its charts
            return Markup('<p class="small">This chart could not be drawn: {}.</p>').format(str(error) or repr(error))

    return drawn


def new_figure(size: tuple[float, float] = _SIZE) -> tuple[Figure, Axes]:
    """Return an empty chart of `size` (width and height in inches), on the page's own ground."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=3)
    return figure, axes


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
        handles, labels = [Patch(alpha=0), *handles], [title, *labels]
    style: dict[str, Any] = {"loc": "outside upper left", "handlelength": 1.6, "columnspacing": 1.4}
    if columns is None:
        columns = max(1, min(6, len(labels), _LEGEND_WIDTH // (max(map(len, labels)) + 5)))
        style = {"loc": "outside upper right", "handlelength": 1.2}
    figure.legend(handles, labels, ncols=columns, borderpad=0, **style)


def as_svg(figure: Figure, *, key: str, alt: str) -> Markup:
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

"""Charts of certificates: cosine and accuracy that are certified at a distance, and what the certificates cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from robustvlm.certify import format_down
from robustvlm.report.canvas import DASHES, INK, SERIES, STYLE, as_svg, chart, legend, new_figure
from robustvlm.stats import Rate

_AXIS = "distance ε from the image (L₂, pixels in [0, 1])"


@dataclass(frozen=True)
class Line:
    """Values over distances: `values` in [-1, 1] for cosines, or `rates` with bands for shares of images."""

    name: str
    eps: tuple[float, ...]
    values: tuple[float, ...] = ()
    rates: tuple[Rate, ...] = ()


@chart
def cosine_curve(lines: Sequence[Line], *, key: str, cos0: float | None) -> Markup:
    """Draw mean certified cosines over distance; an image without a certificate counts as -1, all that is sure then."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, line in enumerate(lines):
            axes.plot(line.eps, line.values, color=SERIES[i], ls=DASHES[i % len(DASHES)], lw=1.8, label=line.name)
        if cos0 is not None:
            axes.axhline(cos0, color=INK, lw=0.8, ls=":")
        axes.set_ylim(-1.03, 1.03)
        axes.set_xlim(left=0)
        axes.set_xlabel(_AXIS)
        axes.set_ylabel("mean certified cosine")
        legend(figure, columns=_columns(lines))
        return as_svg(figure, key=key, alt="Mean certified cosine against distance. " + _alt(lines))


@chart
def share_curve(lines: Sequence[Line], *, key: str, what: str) -> Markup:
    """Draw the share of images certified at a distance, the first two lines with 95 % bands; `what` names the share."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, line in enumerate(lines):
            low, high = ([100 * getattr(rate, end) for rate in line.rates] for end in ("low", "high"))
            if i < 2:  # bands of more lines would cover each other
                axes.fill_between(line.eps, low, high, step="post", color=SERIES[i], alpha=0.18, lw=0)
            axes.step(
                line.eps,
                [100 * (rate.value or 0.0) for rate in line.rates],
                where="post",
                color=SERIES[i],
                ls=DASHES[i % len(DASHES)],
                lw=1.8,
                label=line.name,
            )
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
        axes.set_xlabel(_AXIS)
        axes.set_ylabel(what)
        legend(figure, columns=_columns(lines))
        return as_svg(figure, key=key, alt=f"{what} against distance. " + _alt(lines))


@chart
def samples_histogram(samples: Sequence[int], *, key: str, fixed: int) -> Markup:
    """Draw how many noisy copies each image took, beside the fixed number it would have been."""
    values = np.asarray(samples)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        low, high = max(1.0, float(values.min())), float(max(values.max(), fixed))
        bins = np.geomspace(0.9 * low, 1.1 * high, 31).tolist()
        axes.hist(values, bins, color=SERIES[0], lw=0)
        axes.axvline(fixed, color=INK, lw=1, ls="--", label=f"fixed number: {fixed:,}")
        axes.set_xscale("log")
        # Matplotlib's own labels of a logarithmic axis are formulas, which plain text in an SVG cannot show.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("noisy copies used for an image")
        axes.set_ylabel("images")
        legend(figure, columns=1)
        alt = f"Samples of {len(values)} images: median {np.median(values):,.0f}, largest {values.max():,}."
        return as_svg(figure, key=key, alt=alt)


def _columns(lines: Sequence[Line]) -> int:
    """Four names in one row would be cut off."""
    return 3 if len(lines) < 4 else 2


def _alt(lines: Sequence[Line]) -> str:
    """Say each line's course at five distances."""
    parts = []
    for line in lines:
        picks = np.linspace(0, len(line.eps) - 1, min(5, len(line.eps))).astype(int)
        points = [
            f"{line.eps[i]:.3g}: "
            + (format_down(line.values[i], 2) if line.values else f"{100 * (line.rates[i].value or 0):.1f}%")
            for i in picks
        ]
        parts.append(f"{line.name}: " + ", ".join(points))
    return "; ".join(parts) + "."

"""Charts of a training: loss terms, accuracies with their bands, and norms by level, over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from robustvlm.report.canvas import DASHES, INK, SERIES, STYLE, as_svg, chart, legend, new_figure
from robustvlm.stats import Mean, Rate

Points = Sequence[tuple[int, float]]


@chart
def loss_curves(terms: Mapping[str, Points], *, key: str) -> Markup:
    """Draw every term of the loss over the steps, one line each."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, (name, points) in enumerate(terms.items()):
            colour, dash = SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]
            axes.plot([s for s, _ in points], [v for _, v in points], color=colour, ls=dash, lw=1.5, label=name)
        axes.set_xlim(left=0)
        axes.set_xlabel("steps")
        axes.set_ylabel("mean since the point before")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if len(terms) > 1:
            legend(figure)
        ends = "; ".join(f"{name}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in terms.items())
        return as_svg(figure, key=key, alt=f"Terms of the loss over the steps. {ends}.")


@chart
def rate_curves(rates: Mapping[str, Sequence[tuple[int, Rate]]], *, key: str, kept: int | None) -> Markup:
    """Draw rates over the steps with their 95 % bands, and mark the step whose weights were kept."""
    with mpl.rc_context(STYLE):
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        legend(figure)
        ends = "; ".join(
            f"{name}: {100 * (points[0][1].value or 0):.1f}% to {100 * (points[-1][1].value or 0):.1f}%"
            for name, points in rates.items()
        )
        return as_svg(figure, key=key, alt=f"Validation over the steps. {ends}.")


@chart
def mean_curves(means: Mapping[str, Sequence[tuple[int, Mean]]], *, key: str) -> Markup:
    """Draw means over the steps with their 95 % bands, one line each."""
    with mpl.rc_context(STYLE):
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        legend(figure)
        ends = "; ".join(f"{name}: {points[0][1].value} to {points[-1][1].value}" for name, points in means.items())
        return as_svg(figure, key=key, alt=f"Means over the steps. {ends}.")


@chart
def level_norms(before: Mapping[int, float], after: Mapping[int, float], *, key: str) -> Markup:
    """Draw a quantity by level of the tree, the root on the left, before training and of the kept weights."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, (name, norms) in enumerate((("before", before), ("kept weights", after))):
            levels = sorted(norms, reverse=True)
            axes.plot(
                levels, [norms[level] for level in levels], color=SERIES[i], marker="o", ms=4.5, lw=1.8, label=name
            )
        axes.invert_xaxis()
        axes.set_xlabel("level (0: the classes)")
        axes.set_ylabel("mean norm in the ball")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure)
        shown = ", ".join(f"level {level}: {after[level]:.3f}" for level in sorted(after, reverse=True))
        return as_svg(figure, key=key, alt=f"Mean norm by level, from the root to the classes. {shown}.")

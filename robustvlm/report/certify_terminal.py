"""The tables that end `robustvlm certify` in the terminal; the numbers are the summary's, radii rounded down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.certify import format_down, format_exact, format_up
from robustvlm.certify.claims import RADII
from robustvlm.report import certify_wording as words
from robustvlm.report.wording import interval
from robustvlm.runs.certify_summary import CertifySummary, CosinePoint
from robustvlm.runs.summary import Check
from robustvlm.stats import Rate

_STANDINGS: dict[str, str] = {"held": "bold green", "neutral": "bold yellow", "none": "bold red"}
_COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def certify_table(
    summary: CertifySummary, plan: Mapping[str, Any], trail: Mapping[str, Any] | None = None
) -> RenderableType:
    """Return the closing tables of a certify run: verdict, radii, methods, the cosine curve, cost, risk, threat model.

    Args:
        plan: of the manifest: what the claim is against (`threat`) and what else to know of it (`notes`).
        trail: of the manifest: how often the images have been looked at.
    """
    parts: list[RenderableType] = [
        Text(words.verdict(summary), style=_STANDINGS[words.state(summary)]),
        _by_radius(summary),
        _by_method(summary),
    ]
    if summary.curve:
        parts.append(_curve(summary))
    parts += [_finding(check) for check in summary.checks if check.level != "ok"]
    threat = "Threat model: " + "; ".join(plan["threat"])
    looks = () if trail is None else (words.trail_words(trail, summary.risk.alpha),)
    parts += [Text(line) for line in (*_lines(summary), threat, *plan.get("notes", ()), *looks)]
    return Group(*parts)


def _by_radius(summary: CertifySummary) -> Table:
    table = _table(f"Certified at a radius ({summary.images:,} images, sigma {format_exact(summary.sigma)}, l2)")
    table.add_column("radius")
    table.add_column("certified")
    with_class = summary.certified_correct is not None
    if with_class:
        table.add_column("and right")
    others = list(summary.at[0].others) if summary.at else []
    for column in others:
        table.add_column(RADII[column].short)
    for point in summary.at:
        cells = [format_exact(point.radius), _rate(point.certified)]
        if with_class:
            cells.append(_rate(point.correct))
        table.add_row(*cells, *(_percent(point.others[column]) for column in others))
    return table


def _by_method(summary: CertifySummary) -> Table:
    table = _table("Radii (an abstention counts as 0)")
    for name in ("method", "mean", "median", "abstained"):
        table.add_column(name)
    table.add_column("", justify="left")
    for method in summary.methods:
        column = RADII[method.column]
        name, short, about = column.title, column.short, column.about
        name = name if not short or short.lower() in name.lower() else f"{name} ({short})"
        cells = (format_down(method.mean, 4), format_down(method.median, 4), _percent(method.abstained))
        table.add_row(name, *cells, about, style="bold" if method.column == "radius" else "")
    return table


def _curve(summary: CertifySummary) -> Table:
    at = {share.radius for share in summary.at}
    points = [point for point in summary.curve if point.eps in at]
    columns = [name for name in ("ours", "cone", "paper", "fcsb", "deployed") if _has(points, name)]
    titles = {"ours": "this claim (T4)", "cone": "cone", "paper": "paper's bound", "fcsb": "corrected FCSB"}
    table = _table("Mean certified cosine (an image without a certificate counts as -1)")
    table.add_column("eps")
    for name in columns:
        table.add_column(titles.get(name, "deployed mean"))
    for point in points:
        table.add_row(format_exact(point.eps), *(format_down(getattr(point, name), 3) for name in columns))
    return table


def _has(points: Sequence[CosinePoint], name: str) -> bool:
    return any(getattr(point, name) is not None for point in points)


def _lines(summary: CertifySummary) -> Iterator[str]:
    yield f"Claim: within the radius, {summary.statement}."
    yield f"Rule: {words.rule(summary)}"
    if summary.average_certified_radius is not None and summary.facts.about_class:
        yield f"Average certified radius (wrong or abstained: 0): {format_down(summary.average_certified_radius, 4)}"
    samples = summary.samples
    ends = ", ".join(f"{count:,} {stop}" for stop, count in sorted(samples.stops.items()))
    yield (
        f"Samples: {samples.used:,} of {samples.fixed:,} at a fixed number ({samples.saved:.1%} saved), "
        f"median {samples.median:,.0f} per image; {ends}; {samples.passes:,} encoder passes"
    )
    if summary.failed_samples:
        yield f"{summary.failed_samples:,} noisy copies gave no finite feature and count as the worst value"
    split = "; ".join(f"{name}: {format_exact(alpha)}" for name, alpha in summary.risk.split.items())
    yield (
        f"Error probability {format_exact(summary.risk.alpha)} per image ({split}); expected false certificates over "
        f"the run: at most {format_up(summary.risk.expected_false)}"
    )
    if len(summary.methods) > 1:
        alpha = format_exact(summary.risk.alpha)
        yield f"The other columns are claims of their own at {alpha} each; the largest of all is none"
    yield words.source(summary)
    if summary.unreadable:
        first = summary.unreadable[0]
        yield f"{len(summary.unreadable):,} images could not be read; the first, {first.id}: {first.reason}"
    cost = summary.cost
    yield f"{cost.forward_passes:,} passes in {cost.seconds:,.0f} s ({cost.passes_per_second:,.0f} per second)"


def _finding(check: Check) -> Text:
    return Text(f"{check.level}: {check.message}", style=_COLOURS[check.level])


def _rate(rate: Rate | None) -> str:
    if rate is None or rate.value is None:
        return "-"
    return f"{rate.value:.1%}  {interval(rate)}"


def _percent(rate: Rate) -> str:
    return "-" if rate.value is None else f"{rate.value:.1%}"


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)

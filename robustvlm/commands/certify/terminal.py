"""The tables that end `robustvlm certify` and its audit in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.certify import floor_to, format_down, format_exact, format_up
from robustvlm.certify.claims import RADII
from robustvlm.commands.certify import record as words
from robustvlm.commands.certify.audit_search import BLIND
from robustvlm.commands.certify.config import trail_words
from robustvlm.commands.certify.summary import CertifySummary, CosinePoint
from robustvlm.core.files import read_json
from robustvlm.errors import UserError
from robustvlm.report.words import interval, plain
from robustvlm.runs.manifest import Manifest, run_identity
from robustvlm.runs.records import Check
from robustvlm.stats import Rate

# The tables that end `robustvlm certify` in the terminal; the numbers are the summary's, radii rounded down

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
    looks = () if trail is None else (trail_words(trail, summary.risk.alpha),)
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


# The outcome of an audit as a table: in the terminal and in the report of the run it belongs to


@dataclass(frozen=True)
class AuditRow:
    """All images at one part of their radius, in words."""

    fraction: str
    images: int
    bound: str
    lowest: str
    room: str
    unsettled: int
    broken: int


@dataclass(frozen=True)
class AuditView:
    """An audit as shown."""

    sentence: str
    quantity: str
    broken: bool
    rows: list[AuditRow]
    worst: list[tuple[str, str]]


def audit_view(content: dict[str, Any]) -> AuditView:
    """Return an audit (the content of audit.json) in words.

    Raises KeyError, TypeError or ValueError where it is not one.
    """
    findings: list[dict[str, Any]] = content["findings"]
    fractions = sorted({float(f["fraction"]) for f in findings})
    images = len({f["image_id"] for f in findings})
    broken = [f for f in findings if f["upper"] < f["bound"]]
    return AuditView(
        sentence=_sentence(images, broken) + _search(findings),
        quantity=plain(content.get("quantity", "certified quantity"), 120),
        broken=bool(broken),
        rows=[_row(x, [f for f in findings if float(f["fraction"]) == x]) for x in fractions],
        worst=[
            (
                plain(f["image_id"], 80),
                f"{f['lowest']:.4f} (at most {_up(f['upper'])}) at distance {_up(f['eps'])}, certified "
                f"{format_down(f['bound'], 4)}",
            )
            for f in sorted(broken or findings, key=lambda f: float(f["lowest"] - f["bound"]))[:5]
        ],
    )


def _sentence(images: int, broken: Sequence[dict[str, Any]]) -> str:
    if not images:
        return "No image has a certificate, so there was nothing to attack."
    if broken:
        names = len({f["image_id"] for f in broken})
        return f"Attacks broke the certified bound of {names:,} of {images:,} images: these certificates are false."
    return f"No attack got below a certified bound on any of {images:,} images."


def _search(findings: Sequence[dict[str, Any]]) -> str:
    """Say where the search had no gradient to follow, which makes it the weaker one."""
    blind = len({f["image_id"] for f in findings if str(f.get("start", "")).endswith(BLIND)})
    if not blind:
        return ""
    return f" The encoder gave no gradient on {blind:,} of them, which were searched without one: that finds less."


def _up(value: float) -> str:
    """Return an upper limit with four decimals, rounded up."""
    return f"{-floor_to(-float(value), 4):.4f}"


def _row(fraction: float, findings: Sequence[dict[str, Any]]) -> AuditRow:
    lowest, bound = (np.array([float(f[key]) for f in findings]) for key in ("lowest", "bound"))
    broken = sum(f["upper"] < f["bound"] for f in findings)
    return AuditRow(
        fraction=f"{100 * fraction:.3g}%",
        images=len(findings),
        bound=format_down(float(np.median(bound)), 3),
        lowest=f"{lowest.min():.3f} / {np.median(lowest):.3f}",
        room=f"{(lowest - bound).min():.3f} / {np.median(lowest - bound):.3f}",
        unsettled=int((lowest < bound).sum()) - broken,
        broken=broken,
    )


def load_audit(path: Path, manifest: Manifest) -> AuditView | None:
    """Return the audit stored beside the run of a manifest, or None when there is none that can be read.

    Raises:
        UserError: it is the audit of another run.
    """
    try:
        content = read_json(path)
        view = audit_view(content)
    except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if content.get("of") != run_identity(manifest):
        raise UserError(f"'{path}' is the audit of another run: delete it, or give `robustvlm certify --audit` again")
    return view


def audit_table(content: dict[str, Any]) -> RenderableType:
    """Return the closing table of an audit for the terminal.

    Example:
        >>> from rich.console import Console
        >>> finding = {"image_id": "a", "fraction": 1.0, "eps": 0.1, "bound": 0.5, "lowest": 0.9, "upper": 0.95}
        >>> console = Console(width=110)
        >>> with console.capture() as shown:
        ...     console.print(audit_table({"quantity": "cosine", "findings": [finding]}))
        >>> "No attack got below a certified bound on any of 1 images." in shown.get()
        True
    """
    view = audit_view(content)
    table = Table(title=Text(view.quantity, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("of the radius", "images", "bound (median)", "lowest reached (min / median)", "room above the bound",
                 "below, not certain", "broken"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in view.rows:
        style = "bold red" if row.broken else ""
        cells = (
            row.fraction,
            f"{row.images:,}",
            row.bound,
            row.lowest,
            row.room,
            f"{row.unsettled:,}",
            f"{row.broken:,}",
        )
        table.add_row(*cells, style=style)
    closest = [Text(f"  {name}: {text}", style="dim") for name, text in view.worst]
    parts: list[RenderableType] = [table, Text("Least room:", style="dim"), *closest] if view.rows else []
    return Group(*parts, Text(view.sentence, style="bold red" if view.broken else "bold"))

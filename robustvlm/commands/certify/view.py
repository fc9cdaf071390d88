"""What is said of a certify run, once: the terminal and the HTML report both read it; and of its audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from robustvlm.certify.claims import RADII
from robustvlm.certify.threats import PLAIN
from robustvlm.commands.certify import record as words
from robustvlm.commands.certify.audit_search import BLIND
from robustvlm.commands.certify.pictures import Extreme, cosine_curve, load_extremes, samples_histogram, share_curve
from robustvlm.commands.certify.record import CertifyRecord, cosine_lines, load_certify_run, share_lines
from robustvlm.core.files import read_json
from robustvlm.errors import UserError
from robustvlm.report import screen
from robustvlm.report import sections as doc
from robustvlm.report.page import write_report_of
from robustvlm.report.repeat import repeatable
from robustvlm.report.words import DASH, LEVELS, Finding, cost_rows, count_of, findings, plain
from robustvlm.runs.manifest import Manifest, run_identity
from robustvlm.text import floor_to, format_down, format_exact

# A run, shown in the terminal and on its page


def show(run: CertifyRecord, console: Console) -> None:
    """Print what came of a run, and where it is."""
    closing = doc.Closing({"Report": run.report, "Results": run.folder / "results.parquet"})
    screen.show(console, certify_report(run), closing)


def write_certify_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished certify run, by default to `report.html` in its folder, and return its path."""
    return write_report_of(folder, out, lambda run: certify_report(load_certify_run(run)))


def certify_report(run: CertifyRecord) -> doc.Report:
    """Return all that is said of a certify run; the numbers are the summary's, radii rounded down.

    Raises:
        UserError: the audit beside it is another run's.
    """
    summary = run.summary
    audit = load_audit(run.folder / "audit.json", run.manifest)
    checks = _checks(run, audit)
    state = words.state(summary)
    report = doc.Report(
        kind="certificate report",
        name=run.name,
        kicker="Certificate report",
        facts=doc.facts_line(run.manifest, f", {count_of(summary.images, 'images')}, noise {run.config.against}"),
        verdicts=[doc.Verdict(_verdict(run), "" if state == "none" else state)],
        cards=_cards(run),
        footer=doc.ungrouped_footer(run.manifest, run.summary.checks, run.summary.worth),
        sections=[
            _radii(run),
            *_gallery(run),
            _claimed(run),
            *([] if audit is None else [_audit(audit)]),
            *checks,
            doc.Section("Cost", [doc.Facts([*_copies(run), *cost_rows(summary.cost)], only="both")], "cost", "Cost"),
        ],
    )
    # Nothing is good news beside a fault.
    report = replace(report, verdicts=[doc.Verdict(_verdict(run), "")]) if report.faults else report
    return repeatable(report, run.manifest)


def _verdict(run: CertifyRecord) -> list[doc.Line]:
    summary = run.summary
    lines = [
        words.verdict(summary, resolution=run.config.resolution),
        words.ellipsoid(summary),
        words.spread(summary),
        words.rule(summary),
        words.accuracy(run),
        words.confidence(summary),
    ]
    return [line for line in lines if line]


def _cards(run: CertifyRecord) -> list[doc.Card]:
    """Return the share certified, radius and samples, each with its number and what it means."""
    summary, samples = run.summary, run.summary.samples
    average = summary.average_certified_radius
    by_class = summary.facts.about_class and average is not None
    zero = "abstentions and wrong classes count as 0" if by_class else "abstentions count as 0"
    return [
        doc.Card(
            "Right and certified" if summary.facts.about_class else "Certified",
            words.certified(summary),
            "images",
            good=words.state(summary) == "held",
        ),
        doc.Card(
            "Average certified radius" if by_class else "Mean certified radius",
            format_down(average if by_class and average is not None else summary.mean_radius, 4),
            f"{zero}; median {format_down(summary.median_radius, 4)}",
        ),
        doc.Card(
            "Noisy copies per image",
            f"{samples.median:,.0f}",
            f"median; {samples.used:,} in all, {samples.fixed:,} with the fixed number",
        ),
    ]


_DISTANCES = "Distances are Euclidean, over all pixels of the image the noise is added to, on a scale from 0 to 1."
_JUDGED = "Every method is judged at the same error probability"
_ANCHORS = (
    " on the same noisy copies; those that speak of another anchor (the paper's bound of the unperturbed feature, FCSB "
    "and the distribution bounds of the pilot's direction) are claims of their own"
)


def _radii(run: CertifyRecord) -> doc.Section:
    several = len(run.summary.methods) > 1
    anchors = _ANCHORS if several and run.summary.tokens is None else ""
    threat = run.summary.against
    distances = _DISTANCES if threat.name == PLAIN else f"Distances are {threat.unit}."
    lead = doc.Text(f"{distances} {_JUDGED}{anchors}.", kind="lead")
    charts, table = _charts(run), _by_method(run)
    # Beside a chart there is no room for the column that says what the other methods are about.
    beside: list[doc.Block] = [doc.Pair(charts), table] if several else [doc.Pair([*charts, table])]
    blocks: list[doc.Block] = [lead, *beside, *_by_radius(run), *_by_token(run), *_curve(run)]
    return doc.Section("How far the certificates reach", blocks, "radii", "Radii")


def _charts(run: CertifyRecord) -> list[doc.Chart]:
    summary, config = run.summary, run.config
    about_class, several = summary.facts.about_class, len(summary.methods) > 1
    charts = []
    if lines := cosine_lines(run):
        caption = (
            "Mean over all images of the cosine that is certified at each distance; an image without a certificate "
            "counts as \N{MINUS SIGN}1."
        )
        if summary.spread is not None:
            caption += " The margin is by how much it exceeds the largest cosine to the nearest other image."
        if config.min_cos is not None:
            caption += f" Dotted: the cosine asked for, {format_exact(config.min_cos)}."
        draw = partial(cosine_curve, lines, key="cosine", cos0=config.min_cos, threat=summary.against)
        charts.append(doc.Chart(draw, "Certified cosine", caption))
    if config.radius is None:  # otherwise every radius is that one or none
        what = "right and certified, % of images" if about_class else "certified, % of images"
        caption = "class is right and certified at" if about_class else "certificate reaches"
        caption = f"Images whose {caption} each distance"
        caption += "; 95% bands for the first two." if several else ", with its 95% band."
        draw = partial(share_curve, share_lines(run), key="share", what=what, threat=summary.against)
        charts.append(doc.Chart(draw, "Certified accuracy" if about_class else "Share certified", caption))
    elif run.copies.max(initial=0) > 0:  # a largest radius takes all copies of every image
        draw = partial(samples_histogram, run.copies.tolist(), key="samples", fixed=config.samples)
        caption = "Sampling stops as soon as it is decided whether the radius is certified."
        charts.append(doc.Chart(draw, "Noisy copies used", caption))
    return charts


def _by_method(run: CertifyRecord) -> doc.Table:
    """Return every method's radii over all images, abstentions as zero."""
    found, alpha = run.summary.methods, format_exact(run.summary.risk.alpha)
    paper = next((method.mean for method in found if method.column == "paper_radius"), 0.0)
    to_paper = "paper_radius" in run.summary.facts.columns
    rows: list[doc.Row] = []
    for method in found:
        about = RADII[method.column].about if method.column in RADII else ""
        mean, median = format_down(method.mean, 4), format_down(method.median, 4)
        abstained = f"{method.abstained.successes:,} of {method.abstained.total:,}"
        ratio = [f"{method.mean / paper:.2f}" if paper > 0 else DASH] if to_paper else []
        rows.append((_title(method.column), mean, median, abstained, *ratio, *([about] if len(found) > 1 else [])))
    columns = [
        doc.Column("Radius"),
        *doc.numbers("Mean", "Median", "Abstained", *(["To the paper's"] if to_paper else [])),
    ]
    caption = f"The other rows are claims of their own, at {alpha} each; to take the largest of all is no claim."
    return doc.Table(
        [*columns, *([doc.Column("About")] if len(found) > 1 else [])],
        rows,
        title="By method (an abstention counts as 0)",
        caption=caption if len(found) > 1 else "",
        strong=frozenset({0}),
    )


def _title(column: str) -> str:
    return RADII[column].title if column in RADII else plain(column, 40)


def _by_radius(run: CertifyRecord) -> list[doc.Table]:
    summary = run.summary
    if not summary.at:
        return []
    with_class, others = summary.at[0].correct is not None, list(summary.at[0].others)
    columns = ["Radius", "Certified", *(["Right and certified"] if with_class else []), *map(_title, others)]
    columns[2:2] = [] if summary.at[0].apart is None else ["Nearer to itself than to any other"]
    rows: list[doc.Row] = [
        (
            format_exact(point.radius),
            doc.Measure.of(point.certified),
            *([] if point.apart is None else [doc.Measure.of(point.apart)]),
            *([doc.Measure.of(point.correct)] if with_class else []),
            *(doc.Measure.of(point.others[column]) for column in others),
        )
        for point in summary.at
    ]
    title = f"At given radii ({count_of(summary.images, 'images')}, noise {run.config.against})"
    return [doc.Table([doc.Column(name) for name in columns], rows, title=title)]


def _by_token(run: CertifyRecord) -> list[doc.Table]:
    """Return what is certified of each image token, where the claim is about them."""
    summary = run.summary
    if summary.tokens is None or not summary.at_tokens:
        return []
    rows: list[doc.Row] = [
        (
            format_exact(point.radius),
            format_down(point.worst, 3),
            format_down(point.typical, 3),
            f"{format_down(100 * point.kept, 1)}%",
        )
        for point in summary.at_tokens
    ]
    cosine = "the cosine asked for" if summary.min_cos is None else f"a cosine of {format_exact(summary.min_cos)}"
    share = f"{format_exact(summary.risk.alpha)} / {summary.tokens}"
    return [
        doc.Table(
            [doc.Column("Distance"), *doc.numbers("Worst token", "All tokens", f"Tokens with {cosine}")],
            rows,
            title=f"Certified cosine of each of the {summary.tokens} image tokens, all at once (mean over images)",
            caption=f"A claim of its own: each token's bound is false with probability {share} at most. A token "
            "without a bound counts as -1. The radii above are of all tokens together, which needs no correction for "
            "their number.",
        )
    ]


def _curve(run: CertifyRecord) -> list[doc.Table]:
    """Return the numbers of the chart of cosines, for the terminal."""
    counted = {share.radius for share in run.summary.at}
    points = [point for point in run.summary.curve if point.eps in counted]
    lines = [field for field in words.CURVES if any(getattr(point, field) is not None for point in points)]
    if not lines:
        return []
    rows: list[doc.Row] = [
        (format_exact(point.eps), *(format_down(getattr(point, field), 3) for field in lines)) for point in points
    ]
    title = "Mean certified cosine (an image without a certificate counts as -1)"
    columns = [doc.Column("Distance"), *doc.numbers(*(words.CURVES[field] for field in lines))]
    return [doc.Table(columns, rows, title=title, only="terminal")]


def _claimed(run: CertifyRecord) -> doc.Section:
    rows: list[tuple[str, doc.Line]] = [*words.assumptions(run)]
    said = ("Rule", "Error probability")  # in the terminal the verdict has just said these
    blocks: list[doc.Block] = [
        doc.Facts(rows, kind="sentences"),
        doc.Facts([row for row in rows if row[0] not in said], kind="sentences", only="terminal"),
    ]
    return doc.Section("What is claimed, and under which conditions", blocks, "claim", "What is claimed")


def _checks(run: CertifyRecord, audit: AuditView | None) -> list[doc.Section]:
    found = findings(run.summary.checks)
    if audit is not None and audit.broken:
        found.insert(0, Finding("fault", *LEVELS["fault"], "audit", audit.sentence, "See the audit."))
    reasons = [(image.id, image.reason) for image in run.summary.unreadable]
    lost = doc.left_out(reasons, "unreadable, left out of every number above")
    return [doc.Section("Checks", [doc.Checks(found), *lost], "checks")] if found or lost else []


def _copies(run: CertifyRecord) -> list[tuple[str, str]]:
    samples = run.summary.samples
    saved = f" ({samples.fixed / samples.used:.1f} times as many)" if 0 < samples.used < samples.fixed else ""
    stops = ", ".join(f"{plain(stop, 20)} {count:,}" for stop, count in sorted(samples.stops.items()))
    return [
        ("Noisy copies used", f"{samples.used:,}, at most {samples.largest:,} for an image"),
        ("With the fixed number", f"{samples.fixed:,}{saved}"),
        ("How sampling ended", stops),
    ]


# The images that were hardest and easiest to certify


def _gallery(run: CertifyRecord) -> list[doc.Section]:
    found = load_extremes(run)
    if not found:
        return []
    ends = "with the smallest and the largest radii" if run.config.radius is None else "hardest and easiest to certify"
    lead = (
        "Each beside one copy under the noise of the certificate (shown clipped to the colours of a screen; the model "
        "sees it unclipped)."
    )
    shown = [doc.Pictures([_picture(one) for one in some], title) for title, some in found]
    return [doc.Section(f"Images {ends}", [doc.Text(lead, kind="lead"), *shown], "gallery", "Images")]


def _picture(one: Extreme) -> doc.Picture:
    line: list[doc.Inline] = []
    if one.said:
        right = (" (right)" if one.said == one.label else " (wrong)") if one.label else ""
        line += ["Smoothed model: ", doc.Name(one.said), f"{right}; "]
    if one.label:
        line += ["true class ", doc.Name(one.label), "; "]
    pair = [(one.clean, f"Image {one.image_id}", "image"), (one.noisy, "The image under noise", "under noise")]
    return doc.Picture(pair, [*line, "image ", doc.Code(one.image_id)], title=one.radius)


# The outcome of an audit: at the end of one in the terminal, and in the report of the run it belongs to


def show_audit(content: dict[str, Any], console: Console, *closing: doc.Closing) -> None:
    """Print an audit (the content of audit.json).

    Example:
        >>> finding = {"image_id": "a", "fraction": 1.0, "eps": 0.1, "bound": 0.5, "lowest": 0.9, "upper": 0.95}
        >>> console = Console(width=110)
        >>> with console.capture() as shown:
        ...     show_audit({"quantity": "cosine", "findings": [finding]}, console)
        >>> "No attack got below a certified bound on the one image." in shown.get()
        True
    """
    view = audit_view(content)
    screen.show(console, [*_found(view), doc.Verdict([view.sentence], "" if view.broken else "held")], *closing)


def _audit(view: AuditView) -> doc.Section:
    lead = (
        "Attacks on the smoothed model inside the certified balls: gradient descent through fresh noise from many "
        "starting points. What they reach must stay above the bound; a bound counts as broken only where Monte-Carlo "
        "error is ruled out."
    )
    said = [doc.Text(view.sentence, only="page"), doc.Text(f"Audit: {view.sentence}", only="terminal")]
    return doc.Section("Audit", [doc.Text(lead, kind="lead"), *said, *_found(view)], "audit", "Audit")


def _found(view: AuditView) -> list[doc.Block]:
    if not view.rows:
        return []
    lowest, room = "Lowest reached (min / median)", "Room above the bound (min / median)"
    columns = doc.numbers("Images", "Bound (median)", lowest, room, "Below, not certain", "Broken")
    worst: list[tuple[str, doc.Line]] = [*view.worst]
    return [
        doc.Table(
            [doc.Column("Of the radius"), *columns], view.rows, title=f"Measured: {view.quantity}", strong=view.fallen
        ),
        doc.Facts(worst, title="Least room", only="both"),
    ]


@dataclass(frozen=True)
class AuditView:
    """An audit in words.

    Args:
        rows: all images at each part of their radius. fallen: numbers of the rows in which a bound is broken.
        worst: the images with the least room.
    """

    sentence: str
    quantity: str
    broken: bool
    rows: list[tuple[str, ...]]
    fallen: frozenset[int]
    worst: list[tuple[str, str]]


def audit_view(content: dict[str, Any]) -> AuditView:
    """Return an audit (the content of audit.json) in words.

    Raises KeyError, TypeError or ValueError where it is not one.
    """
    findings: list[dict[str, Any]] = content["findings"]
    fractions = sorted({float(f["fraction"]) for f in findings})
    images = len({f["image_id"] for f in findings})
    broken = _broken(findings)
    at = [[f for f in findings if float(f["fraction"]) == x] for x in fractions]
    return AuditView(
        sentence=_sentence(images, broken) + _search(findings),
        quantity=plain(content.get("quantity", "certified quantity"), 120),
        broken=bool(broken),
        rows=[_row(x, some) for x, some in zip(fractions, at, strict=True)],
        fallen=frozenset(i for i, some in enumerate(at) if _broken(some)),
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
        some = f"{names:,} of {count_of(images, 'images')}"
        return f"Attacks broke the certified bound of {some}: these certificates are false."
    where = "the one image" if images == 1 else f"any of {images:,} images"
    return f"No attack got below a certified bound on {where}."


def _search(findings: Sequence[dict[str, Any]]) -> str:
    """Say where the search had no gradient to follow, which makes it the weaker one."""
    blind = len({f["image_id"] for f in findings if str(f.get("start", "")).endswith(BLIND)})
    if not blind:
        return ""
    return f" The encoder gave no gradient on {blind:,} of them, which were searched without one: that finds less."


def _up(value: float) -> str:
    """Return an upper limit with four decimals, rounded up."""
    return f"{-floor_to(-float(value), 4):.4f}"


def _row(fraction: float, findings: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    lowest, bound = (np.array([float(f[key]) for f in findings]) for key in ("lowest", "bound"))
    return (
        f"{100 * fraction:.3g}%",
        f"{len(findings):,}",
        format_down(float(np.median(bound)), 3),
        f"{lowest.min():.3f} / {np.median(lowest):.3f}",
        f"{(lowest - bound).min():.3f} / {np.median(lowest - bound):.3f}",
        f"{int((lowest < bound).sum()) - len(_broken(findings)):,}",
        f"{len(_broken(findings)):,}",
    )


def _broken(findings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the findings below a bound beyond doubt."""
    return [f for f in findings if f["upper"] < f["bound"]]


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

"""The HTML report of a certify run, and its charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from safetensors import SafetensorError, safe_open

from robustvlm.certify import format_down, format_exact
from robustvlm.certify.claims import RADII
from robustvlm.commands.certify import record as words
from robustvlm.commands.certify.record import CertifyRecord, cosine_lines, load_certify_run, share_lines
from robustvlm.commands.certify.terminal import certify_table, load_audit
from robustvlm.core.files import require_regular
from robustvlm.report import tables
from robustvlm.report.charts import DASHES, INK, SERIES, STYLE, Line, as_svg, chart, legend, new_figure
from robustvlm.report.page import data_uri, drawing, page, write_page
from robustvlm.report.screen import show as show_blocks
from robustvlm.report.sections import Closing
from robustvlm.report.words import DASH, plain

# Charts of certificates: cosine and accuracy that are certified at a distance, and what the certificates cost

_AXIS = "distance ε from the image (L₂, pixels in [0, 1])"


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


# The HTML report of a certify run: one file that needs no network and no script


def write_certify_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished certify run, by default to `report.html` in its folder, and return its path.

    Raises UserError for a folder that holds no finished certify run.
    """
    path = out or folder / "report.html"
    with drawing(folder):
        text = render_certify_run(load_certify_run(folder))
    write_page(path, text)
    return path


def show(run: CertifyRecord, console: Console) -> None:
    """Print what came of a run, and where it is."""
    console.print(certify_table(run.summary, run.manifest["plan"], run.manifest.get("trail")))
    closing = Closing({"Report": run.report, "Results": run.folder / "results.parquet"})
    show_blocks(console, [], closing)


def render_certify_run(run: CertifyRecord) -> str:
    """Return the report of one certify run as HTML."""
    return page(
        "certify.html.j2",
        run=run,
        config=run.config,
        summary=run.summary,
        sentence=words.verdict(run.summary, resolution=run.config.resolution),
        state=words.state(run.summary),
        confidence=words.confidence(run.summary),
        rule=words.rule(run.summary),
        accuracy=words.accuracy(run),
        certified=words.certified(run.summary),
        exact=format_exact,
        about_class=run.summary.facts.about_class,
        to_paper="paper_radius" in run.summary.facts.columns,
        cards=_cards(run),
        charts=_charts(run),
        methods=_methods(run),
        names={name: column.page for name, column in RADII.items()},
        gallery=load_extremes(run),
        audit=load_audit(run.folder / "audit.json", run.manifest),
        findings=tables.findings(run.summary.checks),
        assumptions=words.assumptions(run),
        cost=[*_copies(run), *tables.cost_rows(run.summary.cost)],
        manifest=tables.manifest_rows(run.manifest),
    )


def _cards(run: CertifyRecord) -> list[tuple[str, str, str]]:
    """Return radius and samples, each with its number and what it means."""
    summary, samples = run.summary, run.summary.samples
    average = summary.average_certified_radius
    about_class = run.summary.facts.about_class and average is not None
    return [
        (
            "Average certified radius" if about_class else "Mean certified radius",
            format_down(average if about_class and average is not None else summary.mean_radius, 4),
            ("abstentions and wrong classes count as 0" if about_class else "abstentions count as 0")
            + f"; median {format_down(summary.median_radius, 4)}",
        ),
        (
            "Noisy copies per image",
            f"{samples.median:,.0f}",
            f"median; {samples.used:,} in all, {samples.fixed:,} with the fixed number",
        ),
    ]


def _charts(run: CertifyRecord) -> dict[str, Markup]:
    charts: dict[str, Markup] = {}
    lines = cosine_lines(run)
    if lines:
        charts["cosine"] = cosine_curve(lines, key="cosine", cos0=run.config.min_cos)
    if run.config.radius is None:  # otherwise every radius is that one or none
        what = "right and certified, % of images" if run.summary.facts.about_class else "certified, % of images"
        charts["share"] = share_curve(share_lines(run), key="share", what=what)
    elif run.copies.max(initial=0) > 0:  # a largest radius takes all copies of every image
        charts["samples"] = samples_histogram(run.copies.tolist(), key="samples", fixed=run.config.samples)
    return charts


@dataclass(frozen=True)
class MethodRow:
    """One method's radii over all images, abstentions as zero, in words."""

    name: str
    mean: str
    median: str
    abstained: str
    ratio: str


def _methods(run: CertifyRecord) -> list[MethodRow]:
    found = run.summary.methods
    paper = next((method.mean for method in found if method.column == "paper_radius"), 0.0)
    return [
        MethodRow(
            name=RADII[method.column].page if method.column in RADII else plain(method.column, 40),
            mean=format_down(method.mean, 4),
            median=format_down(method.median, 4),
            abstained=f"{method.abstained.successes:,} of {method.abstained.total:,}",
            ratio=f"{method.mean / paper:.2f}" if paper > 0 else DASH,
        )
        for method in found
    ]


def _copies(run: CertifyRecord) -> list[tuple[str, str]]:
    samples = run.summary.samples
    saved = f" ({samples.fixed / samples.used:.1f} times as many)" if 0 < samples.used < samples.fixed else ""
    stops = ", ".join(f"{plain(stop, 20)} {count:,}" for stop, count in sorted(samples.stops.items()))
    return [
        ("Noisy copies used", f"{samples.used:,}, at most {samples.largest:,} for an image"),
        ("With the fixed number", f"{samples.fixed:,}{saved}"),
        ("How sampling ended", stops),
    ]


@dataclass(frozen=True)
class Extreme:
    """An image with one of the smallest or largest radii, clean and under its noise."""

    image_id: str
    radius: str
    clean: str
    noisy: str
    said: str
    label: str


def load_extremes(run: CertifyRecord) -> list[tuple[str, list[Extreme]]]:
    """Return the stored images with the smallest and with the largest radii; unreadable files are left out."""
    found: list[tuple[tuple[float, int], Extreme]] = []
    for path in sorted((run.folder / "gallery").glob("*.safetensors")):
        try:
            found.append(_extreme(path, run))
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            continue
    found.sort(key=lambda item: item[0])
    images = [image for _, image in found]
    half = len(images) // 2
    titles = (
        ("Abstained, or certified last", "Certified first")
        if run.config.radius
        else ("Smallest radii", "Largest radii")
    )
    groups = [(titles[0], images[:half]), (titles[1], images[half:][::-1])]
    return [(title, some) for title, some in groups if some]


def _extreme(path: Path, run: CertifyRecord) -> tuple[tuple[float, int], Extreme]:
    require_regular(path)
    with safe_open(path, framework="np") as file:
        clean, noisy = file.get_tensor("clean"), file.get_tensor("noisy")
        about = file.metadata() or {}
    if clean.ndim != 3 or clean.shape[0] != 3 or clean.shape != noisy.shape:
        raise ValueError(f"{path.name}: need two images of one shape [3, H, W]")
    radius, names = float(about["radius"]), run.class_names
    return (radius, -int(about["n"])), Extreme(
        image_id=plain(about["image_id"]),
        radius=f"radius {format_down(radius, 4)}" if radius > 0.0 else "abstains",
        clean=data_uri(np.asarray(clean)),
        noisy=data_uri(np.asarray(noisy)),
        said="" if not run.summary.facts.names_class else _name(names, int(about["prediction"])),
        label=_name(names, int(about["label"])),
    )


def _name(names: list[str], index: int) -> str:
    return plain(names[index], 60) if 0 <= index < len(names) else ""

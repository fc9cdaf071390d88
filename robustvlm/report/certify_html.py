"""The HTML report of a certify run: one file that needs no network and no script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from safetensors import SafetensorError, safe_open

from robustvlm.certify import format_down, format_exact
from robustvlm.certify.claims import RADII
from robustvlm.core.reading import require_regular
from robustvlm.report import certify_plots, tables
from robustvlm.report import certify_wording as words
from robustvlm.report.certify_audit import load_audit
from robustvlm.report.certify_record import CertifyRecord, cosine_lines, load_certify_run, share_lines
from robustvlm.report.gallery import data_uri
from robustvlm.report.page import drawing, page, write_page
from robustvlm.report.wording import DASH, plain


def write_certify_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished certify run, by default to `report.html` in its folder, and return its path.

    Raises UserError for a folder that holds no finished certify run.
    """
    path = out or folder / "report.html"
    with drawing(folder):
        text = render_certify_run(load_certify_run(folder))
    write_page(path, text)
    return path


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
        charts["cosine"] = certify_plots.cosine_curve(lines, key="cosine", cos0=run.config.min_cos)
    if run.config.radius is None:  # otherwise every radius is that one or none
        what = "right and certified, % of images" if run.summary.facts.about_class else "certified, % of images"
        charts["share"] = certify_plots.share_curve(share_lines(run), key="share", what=what)
    elif run.copies.max(initial=0) > 0:  # a largest radius takes all copies of every image
        charts["samples"] = certify_plots.samples_histogram(
            run.copies.tolist(), key="samples", fixed=run.config.samples
        )
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

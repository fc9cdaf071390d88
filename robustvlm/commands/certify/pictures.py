"""Pictures of a certify run: its charts, and the images that were hardest and easiest to certify, kept and shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from robustvlm.certify.threats import PLAIN, Noise, Threat, find_threat
from robustvlm.commands.certify.record import CertifyRecord
from robustvlm.core.files import replacing, require_regular
from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.seeds import generator
from robustvlm.data.source import DataSource, Sample
from robustvlm.report.charts import DASHES, INK, SERIES, Line, as_svg, chart, legend, new_figure, whole_numbers
from robustvlm.report.page import data_uri
from robustvlm.report.words import count_of, percent, plain
from robustvlm.text import format_down

L2 = find_threat(PLAIN)

# Cosine and share of images that are certified at a distance, and what that took


def _axis(threat: Threat) -> str:
    """Return what a distance is called under a chart."""
    unit = "L₂, pixels in [0, 1]" if threat.name == PLAIN else threat.unit.partition(":")[0]
    return f"distance ε from the image ({unit})"


@chart
def cosine_curve(lines: Sequence[Line], *, key: str, cos0: float | None, threat: Threat = L2) -> Markup:
    """Draw mean certified cosines over distance; an image without a certificate counts as -1, all that is sure then."""
    figure, axes = new_figure()
    for i, line in enumerate(lines):
        axes.plot(line.eps, line.values, color=SERIES[i], ls=DASHES[i % len(DASHES)], lw=1.8, label=line.name)
    if cos0 is not None:
        axes.axhline(cos0, color=INK, lw=0.8, ls=":")
    axes.set_ylim(-1.03, 1.03)
    axes.set_xlim(left=0)
    axes.set_xlabel(_axis(threat))
    axes.set_ylabel("mean certified cosine")
    legend(figure, columns=_columns(lines))
    return as_svg(figure, key=key, alt="Mean certified cosine against distance. " + _alt(lines))


@chart
def share_curve(lines: Sequence[Line], *, key: str, what: str, threat: Threat = L2) -> Markup:
    """Draw the share of images certified at a distance, the first two lines with 95 % bands; `what` names the share."""
    figure, axes = new_figure()
    for i, line in enumerate(lines):
        low, high = ([100 * getattr(rate, end) for rate in line.rates] for end in ("low", "high"))
        if i < 2:  # bands of more lines would cover each other
            axes.fill_between(line.eps, low, high, step="pre", color=SERIES[i], alpha=0.18, lw=0)
        axes.step(
            line.eps,
            [100 * (rate.value or 0.0) for rate in line.rates],
            where="pre",  # between two distances no more than what the farther one has
            color=SERIES[i],
            ls=DASHES[i % len(DASHES)],
            lw=1.8,
            label=line.name,
        )
    axes.set_ylim(0, 102)
    axes.set_xlim(left=0)
    axes.set_xlabel(_axis(threat))
    axes.set_ylabel(what)
    legend(figure, columns=_columns(lines))
    return as_svg(figure, key=key, alt=f"{what} against distance. " + _alt(lines))


@chart
def samples_histogram(samples: Sequence[int], *, key: str, fixed: int) -> Markup:
    """Draw how many noisy copies each image took, beside the fixed number it would have been."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.asarray(samples)
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
    whole_numbers(axes.yaxis)
    axes.set_xlabel("noisy copies used for an image")
    axes.set_ylabel("images")
    legend(figure, columns=1)
    alt = f"Samples of {count_of(len(values), 'images')}: median {np.median(values):,.0f}, largest {values.max():,}."
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
            + (format_down(line.values[i], 2) if line.values else percent(line.rates[i].value or 0.0))
            for i in picks
        ]
        parts.append(f"{line.name}: " + ", ".join(points))
    return "; ".join(parts) + "."


# The images that were hardest and easiest to certify, each with a noisy copy

ENDS = 6


def save_extremes(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    source: DataSource,
    *,
    framing: Framing,
    noise: Noise,
    seed: int,
) -> None:
    """Write the `ENDS` images with the smallest and the largest radii to `folder`, clean and under their noise.

    Among equal radii, as of a test at one radius, the images that took more copies count as smaller.

    Args:
        folder: made if need be; a file per image, named by its number.
        rows: of the results: index, image_id, label, prediction, radius, n.
        framing: how the run brought images to the resolution where the noise is added.
        noise, seed: noise and seed of the run; the noise shown is drawn from a stream of its own.
    """
    order = sorted(rows, key=lambda row: (row["radius"], -row["n"], row["index"]))
    chosen = {row["image_id"]: row for row in (order if len(order) <= 2 * ENDS else order[:ENDS] + order[-ENDS:])}
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.samples(keep=lambda name: name in chosen):
        row = chosen.pop(item.id, None)
        if row is None or not isinstance(item, Sample):
            continue
        clean = to_pixels(item.image, framing)
        noisy = noise.fresh(clean[None], generator(seed, item.id, "noise that is shown"))[0]
        facts = {key: str(row.get(key)) for key in ("image_id", "index", "label", "prediction", "radius", "n")}
        content = save({"clean": clean.contiguous(), "noisy": noisy.contiguous()}, metadata=facts)
        with replacing(folder / f"{int(row['index']):06d}.safetensors") as temporary:
            temporary.write_bytes(content)
        if not chosen:
            return


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
        said="" if not run.summary.facts.names_class else _name(run.entry_names, int(about["prediction"])),
        label=_name(names, int(about["label"])),
    )


def _name(names: list[str], index: int) -> str:
    return plain(names[index], 60) if 0 <= index < len(names) else ""

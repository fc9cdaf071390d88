"""A finished certify run read back from its folder, and what it found and assumed in plain words."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel

from robustvlm.certify.claims import RADII
from robustvlm.certify.local_noise import read_local_noise
from robustvlm.certify.threats import PLAIN, Moving
from robustvlm.commands.certify.config import CertifyConfig, trail_words
from robustvlm.commands.certify.store import CERTIFY_SCHEMA
from robustvlm.commands.certify.summary import CertifySummary, standing
from robustvlm.core.size import Size, area, sides
from robustvlm.data.splits import group_of_run
from robustvlm.report.charts import Line
from robustvlm.report.words import count_of, percent, plain
from robustvlm.runs.records import read_rows
from robustvlm.runs.run import FinishedRun, not_ended, read_finished
from robustvlm.stats import Rate, rate, worth_of
from robustvlm.text import format_down, format_exact, format_up

# A finished certify run read back from its folder, with the curves that its report draws

_DRAWN = ("radius", "paper_radius", "fcsb_radius", "cone_radius", "direction_radius", "deployed_radius", "mean_radius")
CURVES = {"ours": "this certificate", "paper": "paper's bound", "fcsb": "corrected FCSB", "cone": "cone",
           "deployed": "deployed mean", "margin": "margin to the nearest other image"}  # fmt: skip
_POINTS = 121
_ALWAYS = ("index", "image_id", "label", "prediction", "claim", "radius", "n", "n_pilot", "certificate")
_WANTED = pa.schema([field.with_nullable(field.name not in _ALWAYS) for field in CERTIFY_SCHEMA])


class _Needed(BaseModel):
    config: CertifyConfig


@dataclass(frozen=True)
class CertifyRecord(FinishedRun[CertifySummary]):
    """Manifest, settings, summary and rows of one finished certify run."""

    config: CertifyConfig
    rows: pa.Table

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, indexed by label."""
        return list((self.manifest.get("data") or {}).get("class_names") or [])

    @property
    def entry_names(self) -> list[str]:
        """What predictions of claims about classes stand for: class names, or the images of a gallery."""
        gallery = (self.manifest.get("data") or {}).get("gallery") or {}
        return list(gallery.get("names") or self.class_names)

    def radii(self, method: str) -> NDArray[np.float64] | None:
        """Return a method's radii, one per image; None when the run has none."""
        column = self.rows.column(method) if method in self.rows.column_names else None
        if column is None or column.null_count == len(column):
            return None
        return np.nan_to_num(column.to_numpy(zero_copy_only=False).astype(np.float64))

    @property
    def copies(self) -> NDArray[np.int64]:
        """Noisy copies used, per image."""
        used = self.rows.column("n").to_numpy() + self.rows.column("n_pilot").to_numpy()
        return np.asarray(used, dtype=np.int64)


def load_certify_run(folder: Path) -> CertifyRecord:
    """Read a finished certify run; UserError when it has not ended, is of another kind, or a file is damaged."""
    again = "run the certification again"
    run = read_finished(folder, "summary.json", CertifySummary, kind="certify", needed=_Needed, again=again)
    rows = read_rows(folder / "results.parquet", _WANTED, if_absent=not_ended(folder, "certify"), again=again)
    config = CertifyConfig.model_validate(run.manifest["config"])
    return CertifyRecord(folder, run.manifest, run.summary, config, rows)


def cosine_lines(run: CertifyRecord) -> list[Line]:
    """Return the mean certified cosines over distance, of a feature run."""
    curve = run.summary.curve
    lines = []
    for field, name in CURVES.items():
        values = [getattr(point, field) for point in curve]
        if values and None not in values:
            lines.append(Line(name=name, eps=tuple(point.eps for point in curve), values=tuple(values)))
    return lines


def share_lines(run: CertifyRecord) -> list[Line]:
    """Return, per method, the share of images certified at each distance.

    For claims about classes only images whose class is right count: certified accuracy, over images of known class.
    """
    right = run.rows.column("correct").to_numpy(zero_copy_only=False)
    about_class = run.summary.facts.about_class
    known = np.array([value is not None for value in right]) if about_class else np.ones(len(right), dtype=bool)
    counted = np.array([bool(value) for value in right]) if about_class else known
    found = [(name, radii) for name in _DRAWN if (radii := run.radii(name)) is not None]
    top = max((float(radii.max(initial=0.0)) for _, radii in found), default=0.0)
    grid = np.linspace(0.0, 1.02 * top or 1.0, _POINTS)
    worth, total = run.summary.worth, int(known.sum())
    if worth is not None:  # rows do not tell copies but by their ids: no more than by either count
        group = group_of_run(run.manifest)
        named = [group(name) for name, one in zip(run.rows.column("image_id").to_pylist(), known, strict=True) if one]
        worth = min(worth_of(named), worth / len(right) * total)
    lines = []
    for name, radii in found:
        # At distance zero an abstention certifies nothing either.
        counts = [int((counted & (radii >= eps) & (radii > 0.0)).sum()) for eps in grid]
        rates = tuple(rate(count, total, independent=worth) for count in counts)
        lines.append(Line(name=RADII[name].title, eps=tuple(grid), rates=rates))
    return lines


# What a certify run found and assumed, in plain words

Standing = Literal["held", "neutral", "none"]


def certified(summary: CertifySummary) -> Rate:
    """Return the share of images with a certificate, of those with the right class where the claim is about it."""
    if summary.facts.about_class and summary.certified_correct is not None:
        return summary.certified_correct
    held = summary.abstained
    return Rate(
        successes=held.total - held.successes,
        total=held.total,
        value=None if held.value is None else 1.0 - held.value,
        low=1.0 - held.high,
        high=1.0 - held.low,
        method=held.method,
    )


def state(summary: CertifySummary) -> Standing:
    """Return how a run stands: "held" where half of the images keep the radius that was asked for, "none" where none.

    Without a radius that was asked for nobody has said what would be good: "neutral", however far certificates reach.
    """
    found = standing(summary)
    if found is None or not found[1].successes:
        return "none"
    asked = summary.asked_radius is not None
    return "held" if asked and 2 * found[1].successes >= found[1].total else "neutral"


def verdict(summary: CertifySummary, *, resolution: Size | None = None) -> str:
    """Return the outcome in a sentence or two: how many images, how far, and what such a distance means.

    Args:
        resolution: size of the images, for the comparison with one grey level.
    """
    found = certified(summary)
    cosine = "" if summary.min_cos is None else format_exact(summary.min_cos)
    kept = plain(summary.facts.kept, 300).replace("{min_cos}", cosine or "the one asked for")
    if not found.successes:
        return f"For none of the {count_of(found.total, 'images')} {kept} at any distance."
    who = f"For {found.successes:,} of {count_of(found.total, 'images')} ({percent(found.value)}) {kept}"
    short = summary.against.short
    if summary.asked_radius is not None:
        return f"{who}, within the distance asked for, {format_exact(summary.asked_radius)} ({short})."
    average, at = summary.average_certified_radius, standing(summary)
    by_class = summary.facts.about_class and average is not None
    mean = format_down(average if by_class and average is not None else summary.mean_radius, 4)
    zero = "a wrong class or an abstention counts as 0" if by_class else "an abstention counts as 0"
    parts = [f"{who} within a distance that is {mean} ({short}) on average ({zero})."]
    if at is not None:
        parts.append(f"At the distance {format_exact(at[0])} it holds for {at[1].successes:,} of {at[1].total:,}.")
    if resolution and summary.against.of_pixels and not isinstance(summary.against, Moving):
        grey = math.sqrt(3 * area(resolution)) / 255
        parts.append(f"One grey level in every pixel is a distance of {format_up(grey)}.")
    return " ".join(parts)


def ellipsoid(summary: CertifySummary) -> str:
    """Say how large the ellipsoid is in which certificates hold; "" where what they hold in is none."""
    if summary.half_axes is None or not certified(summary).successes:
        return ""
    least, most = summary.half_axes
    asked = summary.asked_radius
    mean, often = (_mean(summary), " on average") if asked is None else (asked, "")
    return (
        "Distances are half-axes of an ellipsoid, by their geometric mean: it has the volume of an L₂ ball of that "
        f"radius. Its smallest half-axis is {format_down(least)} of it, so that every change with an L₂ length below "
        f"{format_down(least * mean, 4)}{often} is within; the largest is {format_down(most)} of it, "
        f"{format_down(most * mean, 4)}{often}."
    )


def _mean(summary: CertifySummary) -> float:
    """Return the mean radius that is told first: of claims about the class, a wrong one counts as 0."""
    average = summary.average_certified_radius
    return average if summary.facts.about_class and average is not None else summary.mean_radius


def accuracy(run: CertifyRecord) -> str:
    """Say how often the smoothed model is right at all, where the claim itself does not; "" where that is unknown.

    Noise that drowns every image gives large radii: all features are then alike, and none of them is of use.
    """
    right = run.summary.correct
    if run.summary.facts.needs_classes or right is None:
        return ""
    words = f"Under this noise the smoothed model names the right class for {percent(right.value)} of the images"
    few = right.value is not None and right.value < 0.5
    return words + (": features that noise has made alike are easily certified and of little use." if few else ".")


def spread(summary: CertifySummary) -> str:
    """Say how alike different images are under the noise, and for how many the certificate tells them apart."""
    found = summary.spread
    if found is None:
        return ""
    alike, told = "features of different images", "the feature"
    if summary.tokens is not None:
        alike, told = "tokens in which two images differ most", "such a token"
    words = (
        f"Under the same noise the smoothed {alike} have a mean cosine of {found.between:.3f}, and"
        f" of {found.nearest:.3f} to the nearest other of the {found.images:,} (measured)"
    )
    at = standing(summary)
    point = next((point for point in summary.at if at is not None and point.radius == at[0]), None)
    if point is None or point.apart is None:
        return f"{words}; certified cosines below that do not tell images apart."
    share = f"{point.apart.successes:,} of {point.apart.total:,} ({percent(point.apart.value)})"
    return (
        f"{words}: at the distance {format_exact(point.radius)} {told} is certified to stay nearer to its own"
        f" image than to any other for {share}."
    )


def confidence(summary: CertifySummary) -> str:
    """Say how often a certificate may be wrong, and how many of the run."""
    risk = summary.risk
    return (
        f"Each image's certificate is wrong with probability at most {format_exact(risk.alpha)}; over the"
        f" {count_of(summary.images, 'images')} of this run at most {format_up(risk.expected_false)} false certificates"
        " are to be expected."
    )


def rule(summary: CertifySummary) -> str:
    """Say whose answer is certified, and what is stated of finitely many copies."""
    ideal = summary.rule or "the ideal smoothed model, of infinitely many copies"
    kept = summary.deployed or "finitely many copies, as they are deployed, keep less, and nothing is stated of them"
    return f"Certified is {ideal}; {kept}."


def source(summary: CertifySummary) -> str:
    """Say what the radii are worth at the source images."""
    norms = summary.resize_norm
    resized = summary.resized or (norms is not None and norms != (1.0, 1.0))
    if not resized:
        return "Images were not resized: the radii hold for the pixels of the (decoded, 8-bit) source images as well."
    some = f"{summary.resized:,} of {count_of(summary.images, 'images')} were" if summary.resized else "Images were"
    return (
        f"{some} resized first and rounded to 8 bits, which is not linear: of changes made to the image before that,"
        " nothing is certified."
    )


def trail(run: CertifyRecord) -> str:
    """Say how often the images were looked at when the run began; "" for runs from before that was counted."""
    found = run.manifest.get("trail")
    try:
        return trail_words(found, run.config.alpha) if isinstance(found, dict) else ""
    except (KeyError, TypeError, ValueError):
        return ""


_EXACT = (
    "Images and noise are whole numbers whose sum is exact, and what the encoder computes from it is a function of it, "
    "provided that it gives one image the same bits wherever in a batch it stands (the run has looked); "
)


def _attacker(summary: CertifySummary, height: int, width: int) -> str:
    """Say what an attacker may do."""
    where = f"at {height} by {width} pixels on a scale from 0 to 1"
    if summary.against.name == PLAIN:
        added = "Adds to the image any vector of Euclidean length (L₂) below the radius"
        return f"{added}, where the noise is added: {where}."
    given = f"Gives any image in place of the certified one that {summary.against.allows}"
    return f"{given}; where the noise is added, {where}."


def _chosen(config: CertifyConfig) -> str:
    """Say that the noise level is another one for each image; "" where it is the same."""
    if config.dual is None:
        return ""
    chosen = read_local_noise(config.dual).words
    return f" while copies vote for the noise level, and after that of the level chosen: {chosen}"


def assumptions(run: CertifyRecord) -> list[tuple[str, str]]:
    """Return the threat model and the conditions of the certificates, as label and text."""
    config, summary = run.config, run.summary
    height, width = sides(config.resolution)
    rows = [
        ("Statement", plain(summary.statement, 600)),
        ("Rule", plain(rule(summary), 800)),
        ("Attacker", f"{_attacker(summary, height, width)} {source(summary)}"),
        (
            "Noise",
            f"{summary.against.law.format(sigma=format_exact(config.sigma))}{_chosen(config)}. Whoever deploys the"
            " model must draw fresh noise and use the same weights, resize and precision.",
        ),
        ("Error probability", confidence(summary)),
        (
            "Rounding",
            "Radii are rounded down. "
            + (_EXACT if summary.against.exact else "They hold up to floating point: ")
            + f"the arithmetic of the encoder ({plain(config.precision, 20)}) is taken as it is.",
        ),
    ]
    if len(summary.risk.split) > 1:
        parts = ", ".join(f"{plain(name, 40)} {format_exact(part)}" for name, part in summary.risk.split.items())
        rows.insert(5, ("How it is split", parts))
    if looks := trail(run):
        rows.append(("Looks", plain(looks, 600)))
    rows += [("Note", plain(note, 800)) for note in (run.manifest.get("plan") or {}).get("notes", ())]
    if summary.failed_samples:
        rows.append(("Failed passes", f"{summary.failed_samples:,} noisy copies gave no finite feature; worst case."))
    return rows

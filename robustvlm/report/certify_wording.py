"""What a certify run found and assumed, in plain words."""

from __future__ import annotations

import math
from typing import Literal

from robustvlm.certify import format_down, format_exact, format_up
from robustvlm.report.certify_record import CertifyRecord
from robustvlm.report.wording import percent, plain
from robustvlm.runs.certify_looks import trail_words
from robustvlm.runs.certify_summary import CertifySummary, standing
from robustvlm.stats import Rate

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


def verdict(summary: CertifySummary, *, resolution: int | None = None) -> str:
    """Return the outcome in a sentence or two: how many images, how far, and what such a distance means.

    Args:
        resolution: side of the images in pixels, for the comparison with one grey level.
    """
    found = certified(summary)
    cosine = "" if summary.min_cos is None else format_exact(summary.min_cos)
    kept = plain(summary.facts.kept, 300).replace("{min_cos}", cosine or "the one asked for")
    if not found.successes:
        return f"For none of the {found.total:,} images {kept} at any distance."
    who = f"For {found.successes:,} of {found.total:,} images ({percent(found.value)}) {kept}"
    if summary.asked_radius is not None:
        return f"{who}, within the distance asked for, {format_exact(summary.asked_radius)} (L₂)."
    average, at = summary.average_certified_radius, standing(summary)
    by_class = summary.facts.about_class and average is not None
    mean = format_down(average if by_class and average is not None else summary.mean_radius, 4)
    zero = "a wrong class or an abstention counts as 0" if by_class else "an abstention counts as 0"
    parts = [f"{who} within a distance that is {mean} (L₂) on average ({zero})."]
    if at is not None:
        parts.append(f"At the distance {format_exact(at[0])} it holds for {at[1].successes:,} of {at[1].total:,}.")
    if resolution:
        grey = math.sqrt(3 * resolution * resolution) / 255
        parts.append(f"One grey level in every pixel is a distance of {format_up(grey)}.")
    return " ".join(parts)


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


def confidence(summary: CertifySummary) -> str:
    """Say how often a certificate may be wrong, and how many of the run."""
    risk = summary.risk
    return (
        f"Each image's certificate is wrong with probability at most {format_exact(risk.alpha)}; over the"
        f" {summary.images:,} images of this run at most {format_up(risk.expected_false)} false certificates are to be"
        " expected."
    )


def rule(summary: CertifySummary) -> str:
    """Say whose answer is certified, and what is stated of finitely many copies."""
    ideal = summary.rule or "the ideal smoothed model, of infinitely many copies"
    kept = summary.deployed or "a deployed mean of finitely many copies keeps less, and nothing is stated of it"
    return f"Certified is {ideal}; {kept}."


def source(summary: CertifySummary) -> str:
    """Say what the radii are worth at the source images."""
    norms = summary.resize_norm
    resized = summary.resized or (norms is not None and norms != (1.0, 1.0))
    if not resized:
        return "Images were not resized: the radii hold for the pixels of the (decoded, 8-bit) source images as well."
    some = f"{summary.resized:,} of {summary.images:,} images were" if summary.resized else "Images were"
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


def assumptions(run: CertifyRecord) -> list[tuple[str, str]]:
    """Return the threat model and the conditions of the certificates, as label and text."""
    config, summary = run.config, run.summary
    rows = [
        ("Statement", plain(summary.statement, 600)),
        ("Rule", plain(rule(summary), 800)),
        (
            "Attacker",
            "Adds to the image any vector of Euclidean length (L₂) below the radius, where the noise is added: at"
            f" {config.resolution} by {config.resolution} pixels on a scale from 0 to 1. {source(summary)}",
        ),
        (
            "Noise",
            f"Gaussian with standard deviation {format_exact(config.sigma)} in the same pixels, added in float32 after"
            " the resize and before the model's own normalisation, not clipped. Whoever deploys the model must draw"
            " fresh noise and use the same weights, resize and precision.",
        ),
        ("Error probability", confidence(summary)),
        (
            "Rounding",
            "Radii are rounded down. They hold up to floating point: the arithmetic of the encoder"
            f" ({plain(config.precision, 20)}) is taken as it is.",
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

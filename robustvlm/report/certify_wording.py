"""What a certify run found and assumed, in plain words."""

from __future__ import annotations

import numpy as np

from robustvlm.certify import format_down
from robustvlm.report.certify_record import CertifyRecord
from robustvlm.report.wording import percent, plain
from robustvlm.stats import Rate

_KEPT = {
    "feature": "the smoothed feature is certified to keep a cosine of at least {min_cos} to its value at the image",
    "class": "the smoothed model's class is right and certified to stay",
    "vote": "the class that most noisy copies get is right and certified to stay",
    "openset": "the smoothed model's acceptance or rejection is certified to stay",
}
_RULES = {
    "feature": "its feature is the mean over noise",
    "class": "it answers with the class whose text is closest to the mean feature",
    "vote": "it answers with the class that most noisy copies get, another rule than the mean feature's",
    "openset": "it accepts or rejects by the score of its mean feature",
}


def certified(run: CertifyRecord) -> Rate:
    """Return the share of images with a certificate, of those with the right class where the claim is about it."""
    summary = run.summary
    if run.config.claim in ("class", "vote") and summary.certified_correct is not None:
        return summary.certified_correct
    held = summary.abstained
    return Rate(
        successes=held.total - held.successes,
        total=held.total,
        value=None if held.value is None else 1.0 - held.value,
        low=1.0 - held.high,
        high=1.0 - held.low,
    )


def verdict(run: CertifyRecord) -> str:
    """Return the outcome in one sentence."""
    found = certified(run)
    kept = _KEPT[run.config.claim].format(min_cos=run.config.min_cos)
    if not found.successes:
        return f"For none of the {found.total:,} images {kept} at any distance: every certificate abstains."
    if run.config.radius is not None:
        where = f"within the distance asked for, {run.config.radius:g} (L₂)"
    else:
        radii = run.radii("radius")
        assert radii is not None  # there is a certificate
        where = f"half of them within a distance of {format_down(float(np.median(radii[radii > 0])), 3)} (L₂) or more"
    return f"For {found.successes:,} of {found.total:,} images ({percent(found.value)}) {kept}, {where}."


def accuracy(run: CertifyRecord) -> str:
    """Say how often the smoothed model is right at all, where the claim itself does not; "" where that is unknown.

    Noise that drowns every image gives large radii: all features are then alike, and none of them is of use.
    """
    right = run.summary.correct
    if run.config.claim != "feature" or right is None:
        return ""
    words = f"Under this noise the smoothed model names the right class for {percent(right.value)} of the images"
    few = right.value is not None and right.value < 0.5
    return words + (": features that noise has made alike are easily certified and of little use." if few else ".")


def confidence(run: CertifyRecord) -> str:
    """Say how often a certificate may be wrong, and how many of the run."""
    risk = run.summary.risk
    return (
        f"Each image's certificate is wrong with probability at most {risk.alpha:g}; over the {run.summary.images:,}"
        f" images of this run at most {risk.expected_false:.3g} false certificates are to be expected."
    )


def assumptions(run: CertifyRecord) -> list[tuple[str, str]]:
    """Return the threat model and the conditions of the certificates, as label and text."""
    config, summary = run.config, run.summary
    rows = [
        ("Statement", plain(summary.statement, 600)),
        (
            "Attacker",
            "Adds to the image any vector of Euclidean length (L₂) below the radius, where the noise is added: at"
            f" {config.resolution} by {config.resolution} pixels on a scale from 0 to 1.{_source(summary.resize_norm)}",
        ),
        (
            "Noise",
            f"Gaussian with standard deviation {config.sigma:g} in the same pixels, added in float32 after the resize"
            " and before the model's own normalisation, not clipped.",
        ),
        (
            "Rule",
            f"The ideal smoothed model: {_RULES[config.claim]}. A deployed mean of finitely many copies keeps less; it"
            " must draw fresh noise and use the same weights, resize and precision.",
        ),
        ("Error probability", confidence(run)),
        (
            "Rounding",
            "Radii are rounded down. They hold up to floating point: the arithmetic of the encoder"
            f" ({plain(config.precision, 20)}) is taken as it is.",
        ),
    ]
    if len(summary.risk.split) > 1:
        parts = ", ".join(f"{plain(name, 40)} {part:g}" for name, part in summary.risk.split.items())
        rows.insert(5, ("How it is split", parts))
    rows += [("Note", plain(note, 800)) for note in (run.manifest.get("plan") or {}).get("notes", ())]
    if summary.failed_samples:
        rows.append(("Failed passes", f"{summary.failed_samples:,} noisy copies gave no finite feature; worst case."))
    return rows


def _source(norms: tuple[float, float]) -> str:
    low, high = norms
    if low == high == 1.0:
        return ""
    span = f"{high:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"
    return f" Images were resized before: a change of their source grows by a factor of up to {span} (resize norm)."

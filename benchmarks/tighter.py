"""Tighter certificates against today's, from the same copies: angles and mean, prompts chosen later, early answers.

    python -m benchmarks.tighter MODEL --data DATA --limit 20 --samples 1000 --sigma 0.05,0.12

For every image and noise level the encoder sees `--samples` noisy copies once, of which every column is made at alpha =
0.001; radii are in units of sigma, with abstentions as 0. `--features FILE.npz` keeps the copies, or takes kept ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import certifying, copies_made_with, exit_code_of, kept_features, markdown
from robustvlm.certify import Finding, angles, classes, feature
from robustvlm.certify.bands import ell_band, index_band
from robustvlm.certify.certifier import Certifier, unit_rows
from robustvlm.certify.claims.class_ import ClassAtRadius
from robustvlm.certify.claims.feature import FeatureTest, feature_radius
from robustvlm.certify.claims.joint import JointAtRadius
from robustvlm.certify.claims.recall import RecallAtRadius, RecallRadius
from robustvlm.certify.claims.topk import TopAtRadius, TopVotes
from robustvlm.certify.core import copies_needed, core_of
from robustvlm.certify.shapes import halfspace_shift
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline, smooth
from robustvlm.models import zero_shot

ALPHA, COS0, PILOT = 0.001, 0.5, 200
CANDIDATES = (10, 100, 1000, 10_000)
TOP = 2
Lines = list[dict[str, float]]


def main() -> None:
    """Draw or take the copies, and print one table per question."""
    parser = certifying(__doc__, limit=20, samples=1000, sigma="0.05,0.12")
    parser.add_argument("--features", type=Path)
    options = parser.parse_args()
    kept = kept_features(options.features, copies_made_with(options), lambda: draw(options))
    text = unit_rows(kept["text"])
    for sigma in options.sigma.split(","):
        found = [line(unit_rows(kept[f"f{i}_{sigma}"]), text) for i in range(min(options.limit, len(kept["labels"])))]
        print(f"\nsigma {sigma}, {len(found)} images\n")
        print_tables(found)


def draw(options: argparse.Namespace) -> dict[str, Any]:
    """Return texts, labels and noisy features of every image and noise level."""
    source, vlm = open_data(options.data), load_pipeline(options.model).to(memory_format=torch.channels_last)
    kept: dict[str, Any] = {
        "text": zero_shot(vlm, source.class_names, source.templates).class_embeddings.double().numpy()
    }
    samples = [item for item in source.samples(limit=options.limit) if isinstance(item, Sample)]
    for number, sample in enumerate(samples):
        pixels = to_pixels(sample.image, vlm.framing)[None]
        for sigma in map(float, options.sigma.split(",")):
            torch.manual_seed(number * 100 + int(sigma * 1000))
            rows = smooth(vlm, sigma).noisy_features(pixels, options.samples)[0]
            kept[f"f{number}_{sigma}"] = rows.detach().float().numpy()
    return kept | {"labels": np.array([sample.label for sample in samples])}


def line(rows: Any, text: Any) -> dict[str, float]:
    """Return all columns of one image's copies."""
    return _features(rows) | _prompts(rows[:PILOT], rows[PILOT:], text) | _early(rows, text)


def _features(rows: Any) -> dict[str, float]:
    n_pilot = max(50, len(rows) // 20)
    r = feature.norm_lower_bound(feature.PredictableDirection(rows.shape[1]).scores(rows), ALPHA)
    pilot = angles.JointPilot(rows[:n_pilot], cos0=COS0, n=len(rows) - n_pilot, alpha=ALPHA)
    return {"feature (T4)": feature_radius(r, COS0, 1.0), "joint (T20, T4)": angles.joint_shift(pilot, rows[n_pilot:])}


def _prompts(pilot: Any, rest: Any, text: Any) -> dict[str, float]:
    normals = classes.rival_normals(text, int(np.argmax(pilot.mean(axis=0) @ text.T)))
    assert normals is not None

    def by(band: Any) -> float:
        return halfspace_shift(rest, normals, lambda _: 0.0, band)

    core = core_of(pilot, rest, ALPHA)
    found = {"independent": by(ell_band(len(rest), ALPHA)), "any prompts (T21)": core.shift(normals)}
    found |= {f"{n:,} candidates": by(index_band(len(rest), ALPHA / (n * (n - 1)))) for n in CANDIDATES}
    return found | {"needed": float(copies_needed(core, normals, ALPHA) or np.inf)}


def _early(rows: Any, text: Any) -> dict[str, float]:
    common: dict[str, Any] = {"sigma": 1.0, "alpha": ALPHA, "n": len(rows), "n_pilot": PILOT}
    normals = classes.rival_normals(text, int(np.argmax(rows[:PILOT].mean(axis=0) @ text.T)))
    assert normals is not None
    reached = {
        "class": halfspace_shift(rows[PILOT:], normals, lambda _: 0.0, ell_band(len(rows) - PILOT, ALPHA)),
        "topk": _fed(TopVotes(text=text, k=TOP, **common), rows).radius,
        "recall": _fed(RecallRadius(text=text, k=TOP, **common), rows).radius,
    }
    found = {}
    for share in (0.5, 0.9):
        for claim, radius in reached.items():
            asked = {"radius": max(share * radius, 1e-6), **common} | ({} if claim == "class" else {"k": TOP})
            kind: Any = {"class": ClassAtRadius, "topk": TopAtRadius, "recall": RecallAtRadius}[claim]
            answer = _fed(kind(text=text, **asked), rows)
            found[f"{claim} at {share}"] = _spent(answer, rows) if radius > 0.0 else np.nan
    return found | _early_cosine(rows)


def _early_cosine(rows: Any) -> dict[str, float]:
    """How soon a cosine is certified at one sigma and near the largest radius of the joint claim; all copies: never."""
    reached, found = _features(rows)["joint (T20, T4)"], {}
    for name, radius in (("1 sigma", 1.0), ("0.5 of joint", 0.5 * reached), ("0.9 of joint", 0.9 * reached)):
        asked: dict[str, Any] = {
            "radius": max(radius, 1e-6),
            "cos0": COS0,
            "sigma": 1.0,
            "alpha": ALPHA,
            "n": len(rows),
        }
        for claim, certifier in (("feature", FeatureTest(**asked)), ("joint", JointAtRadius(**asked, n_pilot=50))):
            answer = _fed(certifier, rows)
            found[f"{claim} at {name}"] = _spent(answer, rows) if answer.stop == "certified" else 1.0
    return found


def _spent(answer: Finding, rows: Any) -> float:
    """Return the share of the copies that an answer took, those of its pilot among them."""
    return (answer.n + answer.n_pilot) / len(rows)


def _fed(certifier: Certifier, rows: Any) -> Finding:
    used = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(rows[used : used + wanted.sure])
        used += wanted.sure
    return certifier.finding()


def print_tables(found: Lines) -> None:
    """Print mean radii, their ratios to the first column of each kind, and shares of the copies that answers took."""
    radii = [name for name in found[0] if " at " not in name and name != "needed"]
    mean = {name: float(np.mean([row[name] for row in found])) for name in radii}
    base = {name: mean["feature (T4)" if "T4" in name else "independent"] for name in radii}
    ratio = {name: f"{mean[name] / base[name]:.2f}" if base[name] > 0.0 else "" for name in radii}  # of few copies: 0
    rows = [(name, f"{mean[name]:.3f}", ratio[name], f"{_zero(found, name):.2f}") for name in radii]
    print(markdown(("bound", "mean radius / sigma", "ratio", "share of zero"), rows), "\n")
    asked = [name for name in found[0] if " at " in name]
    shares = {name: np.array([row[name] for row in found]) for name in asked}
    early = [(name, f"{np.nanmedian(some):.3f}", f"{np.nanquantile(some, 0.9):.3f}") for name, some in shares.items()]
    print(markdown(("asked", "copies of all, median", "90th percentile"), early), "\n")
    needed = np.median([row["needed"] for row in found])
    print(f"any prompts: about {needed:,.0f} estimation samples would certify some radius for half of the images")


def _zero(found: Lines, name: str) -> float:
    return float(np.mean([row[name] == 0.0 for row in found]))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

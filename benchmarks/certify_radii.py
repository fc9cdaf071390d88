"""Certified radii of every certificate from the same noisy features, and the samples that a decision takes.

    python -m benchmarks.certify_radii MODEL --data DATA --limit 200 --samples 2000 --out radii.jsonl

For every image and noise level the encoder sees `--samples` noisy copies once; all columns are computed from them at
equal alpha. A line of JSON per image and sigma is appended to `--out`; the same command goes on where it was stopped,
a file made with another model, other data or other settings is refused, and `--tables` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import MADE_WITH, certifying, clock, exit_code_of, markdown, require_made_with
from robustvlm.certify import angles, bands, certifier, classes, feature, shapes
from robustvlm.certify.means import SequentialTest, betting_lower, hoeffding_lower
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline, smooth
from robustvlm.models import zero_shot

COS0, ALPHA = 0.5, 0.001
TARGETS = (0.25, 0.5, 1.0)
LOOK_EVERY, CAP = 32, 10_000
RADII = {
    "paper": "paper: T1, anchor f(x), Hoeffding",
    "paper_betting": "paper with betting",
    "fcsb": "correct FCSB: T1, pilot direction, betting",
    "cone": "cone: T3, betting",
    "t4": "vector NP: T4, betting",
    "joint": "angles and mean at one alpha: T20, T4",
    "cdf": "CDF: T5, pilot direction, ELL band",
    "f3": "CDF and covariance: T3, T5, T7",
    "class": "class margin: P1-CDF",
    "vote": "hard vote: Cohen",
}


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = certifying(__doc__, limit=200, samples=2000, sigma="0.12,0.25,0.5")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=Path("radii.jsonl"))
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and measure nothing")
    options = parser.parse_args()
    if not options.tables:
        known = _lines(options.out)
        with options.out.open("a", encoding="utf-8") as out:
            if out.tell():
                out.write("\n")  # a line torn by a kill must not be continued
            for line in measure(options, known=known):
                out.write(json.dumps(line) + "\n")
                out.flush()
    print_tables(_lines(options.out))


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def measure(options: argparse.Namespace, *, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one line per image and sigma that is not among the known ones.

    Raises:
        UserError: a known line was made with another model, other data or other settings.
    """
    source = open_data(options.data)
    vlm = load_pipeline(options.model).to(memory_format=torch.channels_last)
    of = {"model": vlm.fingerprint, "data": source.fingerprint(), "n": options.samples, "precision": options.precision}
    for line in known:
        require_made_with(options.out, line.get(MADE_WITH), of)
    done = {(line["image"], line["sigma"]) for line in known}
    text = zero_shot(vlm, source.class_names, source.templates).class_embeddings.double().numpy()
    for sample in source.samples(limit=options.limit):
        if not isinstance(sample, Sample):
            continue
        pixels = to_pixels(sample.image, vlm.framing)[None]
        for sigma in map(float, options.sigma.split(",")):
            if (sample.id, sigma) in done:
                continue
            with clock() as spent, torch.random.fork_rng(devices=[]), _precision(options.precision):
                torch.manual_seed(derive_seed(0, sample.id, repr(sigma), "benchmark"))
                anchor = _rows(vlm.encode_image(pixels))[0]
                features = _rows(smooth(vlm, sigma).noisy_features(pixels, options.samples)[0])
            yield {
                "image": sample.id,
                "label": sample.label,
                "sigma": sigma,
                "n": options.samples,
                "seconds": spent.seconds,
                **columns(features, anchor, text, sigma),
                MADE_WITH: of,
            }


def _precision(name: str) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "bf16")


def _rows(features: Tensor) -> Any:
    return features.detach().double().numpy()


def columns(features: Any, anchor: Any, text: Any, sigma: float) -> dict[str, Any]:
    """Return all radii, the class and vote labels, and the samples that each target takes, from one set of features."""
    n_pilot = len(features) // 10
    pilot, rest = features[:n_pilot], features[n_pilot:]
    u = pilot.mean(axis=0) / np.linalg.norm(pilot.mean(axis=0))
    at_anchor, along = certifier.direction_scores(features, anchor), certifier.direction_scores(rest, u)
    looking_back = feature.PredictableDirection(features.shape[1]).scores(features)
    r = feature.norm_lower_bound(looking_back, ALPHA)
    band, half = bands.ell_band(len(rest), ALPHA), bands.ell_band(len(rest), ALPHA / 2)
    label = int((pilot.mean(axis=0) @ text.T).argmax())
    voted = int(np.bincount((pilot @ text.T).argmax(axis=1)).argmax())
    votes = int(((rest @ text.T).argmax(axis=1) == voted).sum())
    return {
        "r": r,
        "paper": float(feature.fcsb_radius(hoeffding_lower(at_anchor, ALPHA), COS0, sigma)),
        "paper_betting": float(feature.fcsb_radius(betting_lower(at_anchor, ALPHA), COS0, sigma)),
        "fcsb": float(feature.fcsb_radius(betting_lower(along, ALPHA), COS0, sigma)),
        "cone": float(feature.cone_radius(r, COS0, sigma)),
        "t4": float(feature.vector_table().radius(r, COS0, sigma)),
        "joint": sigma * _joint(features),
        "cdf": shapes.cdf_radius(along, 0.5 * (1.0 + COS0), sigma, band),
        "f3": shapes.direction_radius(along, COS0, sigma, half, shapes.sideways(rest, u, ALPHA / 2)),
        "class": classes.class_margin_radius(rest, text, label, sigma, band),
        "class_label": label,
        "vote": classes.vote_radius(votes, len(rest), sigma, ALPHA),
        "vote_label": voted,
        "decisions": {str(t): _decide(looking_back, t) for t in TARGETS},
    }


def _joint(features: Any) -> float:
    """Return the shift that the joint claim certifies, its pilot among the same samples."""
    n_pilot = max(50, len(features) // 20)
    pilot = angles.JointPilot(features[:n_pilot], cos0=COS0, n=len(features) - n_pilot, alpha=ALPHA)
    return angles.joint_shift(pilot, features[n_pilot:])


def _decide(scores: Any, target: float) -> tuple[str, int]:
    """Return the decision on "the feature radius is at least target sigmas" and the samples it took."""
    test = SequentialTest(0.5 * (1.0 + feature.vector_table().required(COS0, target)), alpha=ALPHA)
    for start in range(0, len(scores), LOOK_EVERY):
        if test.update(scores[start : start + LOOK_EVERY]) != "open":
            return test.decision, test.n + 1  # the first sample only sets the direction
    return "open", CAP


def print_tables(lines: list[dict[str, Any]]) -> None:
    """Print mean radii and decisions per sigma."""
    sigmas = sorted({line["sigma"] for line in lines})
    by_sigma = [[line for line in lines if line["sigma"] == sigma] for sigma in sigmas]
    for sigma, some in zip(sigmas, by_sigma, strict=True):
        right = np.mean([line["class_label"] == line["label"] for line in some])
        print(f"sigma {sigma}: {len(some)} images, n = {some[0]['n']}, smoothed model right on {right:.1%}")
    print()
    header = ["mean radius, cos >= 0.5", *(f"sigma {sigma}" for sigma in sigmas), "ratio to the paper's"]
    print(markdown(header, [_radius_row(key, name, by_sigma) for key, name in RADII.items()]), "\n")
    header = ["samples to decide", "sigma", "certified", "refuted", "open", "median", "90th percentile"]
    rows = [_decision_row(t, s, some) for t in TARGETS for s, some in zip(sigmas, by_sigma, strict=True)]
    print(markdown(header, rows))


def _radius_row(key: str, name: str, by_sigma: list[list[dict[str, Any]]]) -> list[str]:
    means = [np.mean([line[key] for line in some]) for some in by_sigma]
    paper = [np.mean([line["paper"] for line in some]) for some in by_sigma]
    ratios = [f"{mean / base:.2f}" if base > 0 else "inf" for mean, base in zip(means, paper, strict=True)]
    return [name, *(f"{mean:.4f}" for mean in means), " / ".join(ratios)]


def _decision_row(target: float, sigma: float, some: list[dict[str, Any]]) -> list[str]:
    decided = [line["decisions"][str(target)] for line in some]
    counts = [sum(word == wanted for word, _ in decided) for wanted in ("certified", "futile", "open")]
    samples = [n for _, n in decided]
    shown = [f"{np.median(samples):.0f}", f"{np.quantile(samples, 0.9):.0f}"]
    return [f"radius >= {target} sigma", str(sigma), *map(str, counts), *shown]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

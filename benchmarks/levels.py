"""Several noise levels at one alpha against the best single one, from equally many copies of each image.

    python -m benchmarks.levels tiny --data emoji --limit 20 --sigma 0.015,0.03,0.05,0.08 --samples 1000

For every image and noise level `--samples` copies are drawn once. A single level uses them all; several levels use as
many in total. Radii of wrong classes count as 0 in "right", and abstentions everywhere. `--features FILE.npz` keeps the
copies, or takes kept ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import certifying, copies_made_with, exit_code_of, kept_features, markdown
from robustvlm.certify.certifier import unit_rows
from robustvlm.certify.levels import LevelFinding, certify_levels
from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline, smooth
from robustvlm.models import zero_shot

ALPHA, ALONE = 0.001, 100


def main() -> None:
    """Draw or take the copies, and print the table."""
    parser = certifying(__doc__, limit=5, samples=1000, sigma="0.015,0.03,0.05,0.08")
    parser.add_argument("--pilot", type=int, default=30, help="copies of each level that choose among several")
    parser.add_argument("--rules", default="vote,mean")
    parser.add_argument("--features", type=Path)
    options = parser.parse_args()
    sigmas = [float(sigma) for sigma in options.sigma.split(",")]
    of = {**copies_made_with(options), "limit": options.limit}
    kept = kept_features(options.features, of, lambda: draw(options, sigmas))
    header = ["rule", "noise levels", "chosen by", "mean radius, right", "mean radius", "right and certified"]
    print(markdown(header, list(rows_of(kept, sigmas, options))))


def draw(options: argparse.Namespace, sigmas: Sequence[float]) -> dict[str, Any]:
    """Return texts, labels and noisy features of every image and noise level."""
    source, vlm = open_data(options.data), load_pipeline(options.model).to(memory_format=torch.channels_last)
    kept: dict[str, Any] = {
        "text": zero_shot(vlm, source.class_names, source.templates).class_embeddings.double().numpy()
    }
    samples = [item for item in source.samples(limit=options.limit) if isinstance(item, Sample)]
    for number, sample in enumerate(samples):
        pixels = to_pixels(sample.image, vlm.framing)[None]
        for sigma in sigmas:
            torch.manual_seed(number * 100 + int(sigma * 1000))
            rows = smooth(vlm, sigma).noisy_features(pixels, options.samples)[0]
            kept[f"f{number}_{sigma}"] = rows.detach().float().numpy()
    return kept | {"labels": np.array([sample.label for sample in samples])}


def rows_of(kept: dict[str, Any], sigmas: Sequence[float], options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the rows: every single level, then the levels together, by the pilot and by the union."""
    for rule in options.rules.split(","):
        for sigma in sigmas:
            yield row(kept, rule, [sigma], "", found(kept, [sigma], rule == "vote", "pilot", ALONE, options))
        several = [list(some) for size in range(2, len(sigmas) + 1) for some in combinations(sigmas, size)]
        for some in (some for some in several if len(some) in (2, len(sigmas)) and _adjacent(some, sigmas)):
            for spend in ("pilot", "union"):
                results = found(kept, some, rule == "vote", spend, options.pilot, options)
                yield row(kept, rule, some, spend, results)


def _adjacent(some: Sequence[float], sigmas: Sequence[float]) -> bool:
    first = sigmas.index(some[0])
    return list(sigmas[first : first + len(some)]) == list(some)


def found(
    kept: dict[str, Any], sigmas: list[float], votes: bool, spend: Any, pilot: int, options: argparse.Namespace
) -> list[LevelFinding]:
    """Return the certificate of every image; copies are used once each, in their order."""
    text, findings = unit_rows(kept["text"]), []
    for number in range(len(kept["labels"])):
        used = dict.fromkeys(sigmas, 0)

        def fresh(sigma: float, count: int, number: int = number, used: dict[float, int] = used) -> Any:
            start = used[sigma]
            used[sigma] += count
            return kept[f"f{number}_{sigma}"][start : start + count]

        common: dict[str, Any] = {"n": options.samples, "n_pilot": pilot, "alpha": ALPHA}
        findings.append(certify_levels(fresh, text, sigmas, votes=votes, spend=spend, **common))
    return findings


def row(kept: dict[str, Any], rule: str, sigmas: Sequence[float], spend: str, results: list[LevelFinding]) -> list[str]:
    """Return the cells of a row."""
    right = np.array([one.label == label for one, label in zip(results, kept["labels"], strict=True)])
    radius = np.array([one.radius for one in results])
    levels = ", ".join(f"{sigma:g}" for sigma in sigmas)
    return [rule, levels, spend, f"{(radius * right).mean():.4f}", f"{radius.mean():.4f}", f"{right.mean():.1%}"]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

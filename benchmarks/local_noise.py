"""Noise that is chosen for each image against the same noise for all, at equal copies.

    python -m benchmarks.local_noise tiny --data emoji --sigma 0.01,0.02,0.05 --limit 120

Every image is certified by the vote of `--samples` copies at each constant noise level; then with its own level: a
quarter of the copies choose it and judge that choice, the others certify the class at that level (T22). The thresholds
of the choice, and the noise at which copies vote, come from the first half of the images; every column is about the
second half, which shows no drawing of the first. "At best" is what the best level of each image would give, as an
oracle knows it (no certificate).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.common import certifying, exit_code_of, markdown
from robustvlm.certify import Finding, VoteRadius
from robustvlm.certify.claims.local_noise import copies_for_noise
from robustvlm.certify.local_noise import LocalNoise, LocalRadius, choose_thresholds, top_margins
from robustvlm.certify.normal import Array
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_pipeline, smooth
from robustvlm.models import zero_shot


@dataclass(frozen=True)
class Drawn:
    """An image's class, and features of its copies by noise level, for the constant levels and for the choice.

    Images of one `group` are no independent evidence, as copies of a drawing.
    """

    label: int
    group: str
    copies: dict[float, Array]
    more: dict[float, Array]


def main() -> None:
    """Measure, then print the tables."""
    parser = certifying(__doc__, limit=120, samples=1000, sigma="0.01,0.02,0.05")
    parser.add_argument("--vote", default="0.05,0.1,0.2", help="noise at which copies may vote for a level")
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--at", default="0.01,0.02,0.03,0.05,0.08", help="radii")
    options = parser.parse_args()
    sigmas = _numbers(options.sigma)
    text, images = draw(options, sigmas)
    first, second = halves([image.group for image in images])
    half, images = len(first), [images[i] for i in (*first, *second)]
    known = [[constant(image, sigma, text, options) for sigma in sigmas] for image in images]
    worth = np.array([[_worth(one, image) for one in row] for row, image in zip(known, images, strict=True)])
    law = calibrated(images[:half], worth[:half], sigmas, text, options)
    print(f"chosen on {half} images, {len(images) - half} others judged: +dual:{law}\n")
    found = [chosen(image, law, text, options) for image in images[half:]]
    own = np.array([_worth(one, image) for one, image in zip(found, images[half:], strict=True)])
    rows = [
        *((f"{sigma:g} for all", worth[half:, i], [row[i] for row in known[half:]]) for i, sigma in enumerate(sigmas)),
        ("chosen for each", own, found),
        ("at best (oracle)", worth[half:].max(axis=1), None),
    ]
    radii = _numbers(options.at)
    print(table(rows, images[half:], radii))
    kept = np.array([one.columns["noise_radius"] for one in found])
    level = np.array([one.columns["level_radius"] for one in found])
    used = [f"{sigma:g}: {sum(one.columns['noise_level'] == sigma for one in found)}" for sigma in sigmas]
    limits = np.mean((kept < level) & (level > 0))
    print(f"\nlevels chosen: {', '.join(used)}; no level certified: {np.mean(kept == 0):.1%}")
    print(f"the choice limits the radius of {limits:.1%}")


def draw(options: argparse.Namespace, sigmas: Sequence[float]) -> tuple[Array, list[Drawn]]:
    """Return the class texts [K, D], and the images with noisy features at every level."""
    source, vlm, votes = open_data(options.data), load_pipeline(options.model), _numbers(options.vote)
    text = zero_shot(vlm, source.class_names, source.templates).class_embeddings.double().numpy()
    images = []
    for sample in source.samples(limit=options.limit):
        if isinstance(sample, Sample):
            pixels = to_pixels(sample.image, vlm.framing)[None]
            torch.manual_seed(derive_seed(0, "local noise", sample.id))
            parts = [
                {sigma: smooth(vlm, sigma).noisy_features(pixels, n)[0].double().numpy() for sigma in levels}
                for levels, n in ((sigmas, options.samples), (votes, copies_for_noise(options.samples)))
            ]
            images.append(Drawn(sample.label, source.group(sample.id), *parts))
    return text, images


def halves(groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the rows that choose and those that are judged, which share no group: about as many of each, in order."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    first: list[int] = []
    for some in rows.values():
        if len(first) + len(some) <= len(groups) // 2:
            first += some
    return sorted(first), sorted(set(range(len(groups))) - set(first))


def _numbers(written: str) -> tuple[float, ...]:
    return tuple(map(float, written.split(",")))


def _fed(certifier: VoteRadius | LocalRadius, image: Drawn) -> Finding:
    """Return what an image's copies certify: those of the choice are other ones than those of the level chosen."""
    used = 0
    while (wanted := certifier.request()) is not None:
        if wanted.stage == "noise":
            certifier.take(image.more[certifier.sigma][: wanted.sure])
            continue
        certifier.take(image.copies[certifier.sigma][used : used + wanted.sure])
        used += wanted.sure
    return certifier.finding()


def constant(image: Drawn, sigma: float, text: Array, options: argparse.Namespace) -> Finding:
    """Return what the vote at one noise level certifies of an image."""
    n = options.samples
    return _fed(VoteRadius(text=text, sigma=sigma, alpha=options.alpha, n=n, n_pilot=n // 10), image)


def chosen(image: Drawn, law: LocalNoise, text: Array, options: argparse.Namespace) -> Finding:
    """Return what the vote at a level of its own certifies of an image, with as many copies."""
    noise = copies_for_noise(options.samples)
    n = options.samples - noise

    def level(i: int) -> VoteRadius:
        return VoteRadius(text=text, sigma=law.sigmas[i], alpha=options.alpha / 2, n=n, n_pilot=n // 10)

    return _fed(LocalRadius(noise=law, text=text, certifier=level, alpha=options.alpha, n=n, n_noise=noise), image)


def calibrated(
    images: Sequence[Drawn], worth: Array, sigmas: tuple[float, ...], text: Array, options: argparse.Namespace
) -> LocalNoise:
    """Return the choice that gives these images the largest mean radius, right or 0, when made with as many copies."""
    judging = copies_for_noise(options.samples) * 4 // 5
    best, law = -1.0, None
    for at in _numbers(options.vote):
        margins = np.stack([top_margins(image.more[at][-judging:], text) for image in images])
        thresholds = choose_thresholds(margins, worth, at, alpha=options.alpha / 2)
        tried = LocalNoise(sigmas, tuple(round(edge, 4) for edge in thresholds), at)
        found = [chosen(image, tried, text, options) for image in images]
        mean = float(np.mean([_worth(one, image) for one, image in zip(found, images, strict=True)]))
        if mean > best:
            best, law = mean, tried
    assert law is not None
    return law


def _worth(found: Finding, image: Drawn) -> float:
    return found.radius if found.prediction == image.label else 0.0


def table(
    rows: Sequence[tuple[str, Array, list[Finding] | None]], images: Sequence[Drawn], radii: Sequence[float]
) -> str:
    """Return certified accuracy at radii, clean accuracy of the smoothed model, and mean radius (0 where wrong)."""
    cells = []
    for name, worth, found in rows:
        pairs = [] if found is None else list(zip(found, images, strict=True))
        right = f"{np.mean([one.prediction == image.label for one, image in pairs]):.1%}" if pairs else ""
        shares = [f"{np.mean(worth >= radius):.1%}" for radius in radii]
        cells.append([name, right, f"{np.mean(worth > 0):.1%}", *shares, f"{worth.mean():.4f}"])
    return markdown(["noise", "right", "certified, > 0", *(f"at {radius:g}" for radius in radii), "mean radius"], cells)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

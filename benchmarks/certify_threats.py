"""Vote certificates against every threat, each with its own noise, and what drawing that noise costs.

    python -m benchmarks.certify_threats MODEL --data DATA --limit 16 --samples 400

A run of `robustvlm certify MODEL --threat NAME --claim vote` for each threat at its noise level (`--noise` for others),
with all its images and copies. Radii of different threats are in different units and are not compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import certifying, clock, exit_code_of, markdown
from robustvlm.certify.threats import THREATS, Noise, read_noise
from robustvlm.commands.certify import certify
from robustvlm.text import format_down

# Of pixels as much as a model that never saw noise stands; of the others the usual level.
LEVELS = {"l2": 0.03, "8bit": 0.03, "l1": 0.03, "rotation": 0.03}
ALPHA = 0.001


def main() -> None:
    """Certify the images against each threat and print a row for it."""
    parser = certifying(__doc__, limit=16, samples=400, sigma=None)
    parser.add_argument("--noise", help="as 'brightness=0.2;ellipsoid@1,1,2=0.1'; default: every threat without scales")
    options = parser.parse_args()
    usual = [Noise(threat, LEVELS.get(name, threat.usual)) for name, threat in THREATS.items()]
    chosen = usual if options.noise is None else [read_noise(text) for text in options.noise.split(";")]
    rows = []
    for noise in chosen:
        rows.append(row(noise, options))
        print(markdown(rows[-1], []).splitlines()[0], flush=True)
    head = [
        "threat",
        "sigma",
        "right under the noise",
        "right and certified",
        "mean radius, 0 where wrong",
        "ms to draw a copy",
    ]
    print(markdown(head, rows))


def row(noise: Noise, options: argparse.Namespace) -> list[str]:
    """Return what one threat gave."""
    with tempfile.TemporaryDirectory() as out:
        found = certify(
            options.model, data=options.data, claim="vote", threat=noise.threat.name, sigma=noise.sigma,
            samples=options.samples, alpha=ALPHA, limit=options.limit, out=Path(out), device="cpu",
        ).summary  # fmt: skip
    shares = [f"{rate.successes} of {rate.total}" for rate in (found.correct, found.certified_correct) if rate]
    return [
        noise.threat.name, f"{noise.sigma:g}", *shares, format_down(found.average_certified_radius or 0.0, 4),
        f"{1000 * drawing(noise):.2f}",
    ]  # fmt: skip


def drawing(noise: Noise, rows: int = 64, side: int = 64) -> float:
    """Return seconds to draw one noisy copy of a 64-pixel image, of batches of `rows`."""
    pixels = torch.randint(0, 256, (rows, 3, side, side)).float() / 255
    noise.fresh(pixels)
    with clock() as spent:
        for _ in range(5):
            noise.fresh(pixels)
    return spent.seconds / (5 * rows)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

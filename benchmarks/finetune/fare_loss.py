"""FARE's loss before and after, without an attack, under the attack that it is trained with, and under a stronger one.

    python -m benchmarks.finetune.fare_loss lit-emoji --fp32

A training shows its loss under its own few steps of PGD, which find less than there is. And it begins at the original,
whose clean features are where they should be by construction, so that every change adds to it.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from benchmarks.common import exit_code_of, markdown
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.models import VLM, load_model
from robustvlm.training import Draws
from robustvlm.training.images import Batch

from .options import arguments, open_set, plan_of
from .rows import training_images, tune
from .variants import VARIANTS

IMAGES = 256
STRONG = 20
"""Steps of the stronger attack."""


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(arguments(__doc__ or "").parse_args(argv)))


def run(options: argparse.Namespace) -> None:
    """Tune with FARE, of the first seed, and print the table."""
    torch.set_num_threads(1)
    plan, benchmark = plan_of(options), open_set(options)
    seed = int(options.seeds.split(",")[0])
    data = training_images(benchmark, seed, plan)
    original, tuned = load_model(benchmark.model), load_model(benchmark.model)
    record = tune(tuned, benchmark, VARIANTS["fare"], seed, data, plan)
    batch = next(iter(data.batches([range(IMAGES)])))
    with torch.no_grad():
        wanted = original.embed_image(batch.pixels)
    attacks = [InnerAttack(threat=plan.threat, steps=steps) for steps in (plan.inner_steps, STRONG)]
    lines = []
    for name, vlm in (("as it is", original), ("tuned", tuned)):
        found = [distances(vlm, batch.pixels, wanted), *(attacked(vlm, batch, wanted, attack) for attack in attacks)]
        lines.append([name, *(f"{each.mean().item():.0f}" for each in found)])
    print(markdown(["model", "no attack", *(f"PGD, {attack.steps} steps" for attack in attacks)], lines))
    print(
        f"\nShown by the training: {record['first']['loss']:.0f} in the first step, {record['last']['loss']:.0f} last"
    )


def attacked(vlm: VLM, batch: Batch, wanted: Tensor, attack: InnerAttack) -> Tensor:
    """Return the distances [B] at the points of an inner attack on FARE's loss."""
    draws = Draws(0, 0, batch.ids)
    points, _ = attack(lambda x, _: distances(vlm, x, wanted).sum(), batch.pixels, draws)
    with torch.no_grad():
        return distances(vlm, points, wanted)


def distances(vlm: VLM, x: Tensor, wanted: Tensor) -> Tensor:
    """Return squared distances [B] of features from wanted ones [B, D] (FARE, arXiv 2402.12336, equation 3)."""
    return (vlm.embed_image(x) - wanted).square().sum(1)


if __name__ == "__main__":
    sys.exit(main())

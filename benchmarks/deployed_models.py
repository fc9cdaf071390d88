"""Whole deployed models attacked inside their certified radii: noise chosen for each image, and heads that refuse.

    python -m benchmarks.deployed_models tiny+dual:0.01,0.02:0.05:0.02:64:0.001:vote --data emoji --limit 20

The model is certified by the command, for the rule that it has. Each certified image is then attacked at `--fractions`
of its radius: normalised gradients through the deployed model itself, over `--eot` of its answers with fresh copies
each, of the evidence for the certified answer, be it a class or "none of the classes". At the point reached the model
answers `--answers` times. What counts is another answer than the certified one or none at all: of a class a rival or
"none", of "none" a class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import robustvlm as rv
from benchmarks.common import certifying, exit_code_of
from benchmarks.deployed_rule import attacked
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import load_classifier
from robustvlm.defenses.classifier import Classifier
from robustvlm.errors import UserError


def main() -> None:
    """Certify, attack, print the table."""
    parser = certifying(__doc__, limit=20, samples=400, sigma="")
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--fractions", default="0.25,0.5,0.75,0.99")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--eot", type=int, default=2)
    parser.add_argument("--answers", type=int, default=8)
    print(attacked(list(measured(parser.parse_args())), parser.parse_args().alpha, rules=("deployed",)))


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what the deployed model answered at the attacked points of each certified image."""
    source = open_data(options.data)
    model = load_classifier(options.model, source.class_names, source.templates)
    with tempfile.TemporaryDirectory() as folder:
        run = rv.certify(
            options.model, data=options.data, limit=options.limit, samples=options.samples, alpha=options.alpha,
            out=Path(folder),
        )  # fmt: skip
        rows = {row["image_id"]: row for row in run.rows.to_pylist() if row["radius"] > 0.0}
        config = run.config
    if config.threat is not None:  # the attack's distances are l2
        raise UserError(f"radii against {config.threat} are no l2 distances: pass a model with +smooth:SIGMA or +dual")
    parts = [float(part) for part in options.fractions.split(",")]
    for sample in source.samples(keep=lambda name: name in rows):
        if not isinstance(sample, Sample) or sample.id not in rows:
            continue
        row, pixels = rows[sample.id], to_pixels(sample.image, model.framing)
        torch.manual_seed(derive_seed(0, "deployed models", options.model, sample.id))
        radii = torch.tensor([part * row["radius"] for part in parts])
        reached = attack(model, pixels, row["prediction"], radii, steps=options.steps, eot=options.eot)
        said = answers(model, reached, options.answers)
        yield {
            "sigma": config.sigma,
            "attacks": [
                {"rule": "deployed", "eps": eps, "inside": True, "label": row["prediction"], "said": one}
                for eps, one in zip(radii.tolist(), said, strict=True)
            ],
        }


def attack(model: Classifier, pixels: Tensor, label: int, radii: Tensor, *, steps: int, eot: int) -> Tensor:
    """Return the points [R, 3, S, S] within `radii` [R] at which the evidence for the certified answer is least."""
    size, classes = radii.view(-1, 1, 1, 1), len(model.class_names)
    change = torch.zeros(len(radii), *pixels.shape)
    for step in range(steps):
        change.requires_grad_(True)
        output = torch.stack([model(pixels + change) for _ in range(eot)]).double()
        logits, evidence = output[..., :-1], output[..., -1]
        # Of a class: its log share, and the evidence that anything is answered; of "none": that it is no class.
        loss = -evidence if label == classes else logits.log_softmax(dim=-1)[..., label] + evidence
        (slope,) = torch.autograd.grad(loss.mean(dim=0).sum(), change)
        slope = torch.nan_to_num(slope)
        stride = size if step == 0 else size / 2
        change = change.detach() - stride * slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        length = change.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        change = change * (size / length).clamp_max(1.0)
    return (pixels + change).detach()


@torch.no_grad()
def answers(model: Classifier, pixels: Tensor, times: int) -> list[list[int]]:
    """Return what is answered at images [R, 3, S, S]: a class, the number of classes for "none", -1 for nothing."""
    said = []
    for _ in range(times):
        output = model(pixels)
        answer = torch.where(output[:, -1] > 0, output[:, :-1].argmax(dim=1), -1)
        undecided = model.undecided(output)
        if undecided is not None:
            answer = torch.where((output[:, -1] <= 0) & ~undecided, len(model.class_names), answer)
        said.append(answer.tolist())
    return [list(map(int, one)) for one in zip(*said, strict=True)]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""The deployed rule beside the ideal one, and attacked inside its certified radius by expectation over its copies.

    python -m benchmarks.deployed_rule MODEL --data DATA --limit 20 --out deployed.jsonl

For every image and noise level the class is certified by the mean and by the vote of `--samples` copies. Each certified
image is then attacked at `--fractions` of its radius: normalised gradients of the label's mean probability over
`--eot` fresh copies, in the whole ball. At the point reached, `--answers` deployments of `--n0` fresh copies answer by
either rule. A line of JSON per image and sigma is appended to `--out`; the same command goes on where it was stopped,
a file made with another model, other data or other settings is refused, and `--tables` only prints what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from benchmarks.common import MADE_WITH, certifying, exit_code_of, markdown, require_made_with
from robustvlm.certify import Certifier, ClassRadius, VoteRadius
from robustvlm.certify.means import clopper_pearson_upper
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import derive_seed
from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.defenses import SmoothedVLM, load_pipeline, smooth
from robustvlm.defenses.abstaining import by_mean, by_vote
from robustvlm.models import zero_shot

SETTINGS = ("samples", "n0", "alpha", "fractions", "steps", "eot", "answers")
RULES = {"mean": (ClassRadius, by_mean), "vote": (VoteRadius, by_vote)}


def main() -> None:
    """Measure what is missing, then print the tables."""
    parser = certifying(__doc__, limit=20, samples=400, sigma="0.12,0.25,0.5")
    parser.add_argument("--n0", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=0.001)
    parser.add_argument("--fractions", default="0.25,0.5,0.75,0.99")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--eot", type=int, default=8)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("deployed.jsonl"))
    parser.add_argument("--tables", action="store_true", help="print the tables of --out and measure nothing")
    options = parser.parse_args()
    if not options.tables:
        measure(options)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(side_by_side(rows))
    print(attacked(rows, options.alpha))


def measure(options: argparse.Namespace) -> None:
    """Append a line for every image and noise level that is not there."""
    source, vlm = open_data(options.data), load_pipeline(options.model)
    of = {"model": vlm.fingerprint, "data": source.fingerprint()}
    of |= {name: getattr(options, name) for name in SETTINGS}
    known = list(map(json.loads, options.out.read_text().splitlines())) if options.out.exists() else []
    for row in known:
        require_made_with(options.out, row.get(MADE_WITH), of)
    done = {(row["sigma"], row["image"]) for row in known}
    text = zero_shot(vlm, source.class_names, source.templates).class_embeddings
    samples = [item for item in source.samples(limit=options.limit) if isinstance(item, Sample)]
    for sigma in map(float, options.sigma.split(",")):
        model = smooth(vlm, sigma, options.n0)
        for sample in samples:
            if (sigma, sample.id) in done:
                continue
            # The type of a part counts in a seed; the published tables are of this one.
            torch.manual_seed(derive_seed(0, "deployed rule", sigma, sample.id))  # type: ignore[arg-type]
            pixels = to_pixels(sample.image, vlm.framing)
            row = one_image(model, pixels, text, options) | {"image": sample.id, "sigma": sigma, "label": sample.label}
            row[MADE_WITH] = of
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def one_image(model: SmoothedVLM, pixels: Tensor, text: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Certify an image by both rules, and let the deployed rules answer, clean and at the attacked points."""
    began, table = time.process_time(), text.double().numpy()
    copies = model.noisy_features(pixels[None], options.samples)[0].double().numpy()
    clean = answers(model, pixels[None], text, options)
    found: dict[str, Any] = {"passes": options.samples, "attacks": []}
    for name, (kind, _) in RULES.items():
        certifier = kind(
            text=table, sigma=model.sigma, alpha=options.alpha, n=options.samples, n_pilot=options.samples // 4,
            deployed=options.n0, abstains_at=options.alpha,
        )  # fmt: skip
        finding = fed(certifier, copies)
        found[name] = {
            "label": finding.prediction,
            "ideal": finding.radius,
            "answers": finding.columns["deployed_radius"],
            "clean": clean[name][0],
        }
    label, radius = found["vote"]["label"], found["vote"]["ideal"]
    if radius > 0:
        parts = torch.tensor([float(part) * radius for part in options.fractions.split(",")])
        reached = attack(model, pixels, text, label, parts, options)
        for rule, all_said in answers(model, reached, text, options).items():
            for eps, said in zip(parts.tolist(), all_said, strict=True):
                inside = eps < found[rule]["ideal"] and found[rule]["label"] == label
                found["attacks"].append({"rule": rule, "eps": eps, "inside": inside, "label": label, "said": said})
    found["seconds"] = time.process_time() - began
    return found


def fed(certifier: Certifier, copies: np.ndarray) -> Any:
    """Return what a certifier finds in copies [n, D], the pilot first."""
    start = 0
    while (wanted := certifier.request()) is not None:
        certifier.take(copies[start : start + wanted.sure])
        start += wanted.sure
    return certifier.finding()


def attack(
    model: SmoothedVLM, pixels: Tensor, text: Tensor, label: int, radii: Tensor, options: argparse.Namespace
) -> Tensor:
    """Return the points [R, 3, S, S] within `radii` [R] at which the label's mean probability is least."""
    size = radii.view(-1, 1, 1, 1)
    change = torch.zeros(len(radii), *pixels.shape)
    for step in range(options.steps):
        change.requires_grad_(True)
        logits = model.logit_scale * model.drawn(pixels + change, options.eot) @ text.T
        loss = logits.softmax(dim=2)[:, :, label].mean(dim=1).clamp_min(1e-9).log().sum()
        (slope,) = torch.autograd.grad(loss, change)
        # The first step goes to the edge of the ball, where a smoothed model is weakest; the others turn there.
        stride = size if step == 0 else size / 2
        change = change.detach() - stride * slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        length = change.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        change = change * (size / length).clamp_max(1.0)
    return (pixels + change).detach()


def answers(
    model: SmoothedVLM, pixels: Tensor, text: Tensor, options: argparse.Namespace
) -> dict[str, list[list[int]]]:
    """Return, by rule, what deployments answer at images [R, 3, S, S]: a list each of classes, -1 for no answer.

    Both rules answer from the same copies.
    """
    copies = model.noisy_features(pixels, options.n0 * options.answers)
    copies = copies.view(len(pixels) * options.answers, options.n0, -1)
    found = {}
    for rule, (_, answer) in RULES.items():
        logits, evidence = answer(copies, text, model.logit_scale)
        said = torch.where(evidence >= np.log(1.0 / options.alpha), logits.argmax(dim=1), -1)
        found[rule] = [list(map(int, part)) for part in said.view(len(pixels), options.answers)]
    return found


def side_by_side(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the ideal and the deployed rule at each noise level."""
    return markdown(
        ["sigma", "rule", "images", "right and certified, ideal", "right and certified to be answered",
         "certified, right or wrong: ideal", "certified to be answered", "mean radius, ideal",
         "mean radius, certified to be answered", "right, deployed", "no answer, deployed", "wrong, deployed"],
        list(_rules(rows)),
    )  # fmt: skip


def _rules(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for sigma in sorted({row["sigma"] for row in rows}):
        some = [row for row in rows if row["sigma"] == sigma]
        for rule in RULES:
            facts = [row[rule] | {"truth": row["label"]} for row in some]
            clean = [(said, fact["truth"]) for fact in facts for said in fact["clean"]]
            right = [fact["label"] == fact["truth"] for fact in facts]
            shares = [
                np.mean([good and fact[kind] > 0 for good, fact in zip(right, facts, strict=True)])
                for kind in ("ideal", "answers")
            ] + [np.mean([fact[kind] > 0 for fact in facts]) for kind in ("ideal", "answers")]
            yield [
                f"{sigma:g}", rule, str(len(some)), *(f"{share:.1%}" for share in shares),
                *(f"{np.mean([fact[kind] for fact in facts]):.4f}" for kind in ("ideal", "answers")),
                f"{np.mean([said == truth for said, truth in clean]):.1%}",
                f"{np.mean([said < 0 for said, _ in clean]):.1%}",
                f"{np.mean([said not in (-1, truth) for said, truth in clean]):.1%}",
            ]  # fmt: skip


def attacked(rows: Sequence[dict[str, Any]], alpha: float, *, rules: Iterable[str] = tuple(RULES)) -> str:
    """Return the table of what deployments answered inside the certified radius, under attack."""
    found = [one | {"sigma": row["sigma"]} for row in rows for one in row["attacks"] if one["inside"]]
    cells = []
    for rule in rules:
        for sigma in [*sorted({one["sigma"] for one in found}), None]:
            some = [one for one in found if one["rule"] == rule and sigma in (None, one["sigma"])]
            said = [(one["label"], answer) for one in some for answer in one["said"]]
            wrong = sum(answer not in (-1, label) for label, answer in said)
            kept = sum(answer == label for label, answer in said)
            if said:
                cells.append(
                    [rule, "all" if sigma is None else f"{sigma:g}", f"{len(some):,}", f"{len(said):,}",
                     f"{kept / len(said):.1%}", f"{1 - (kept + wrong) / len(said):.1%}", str(wrong),
                     f"{float(clopper_pearson_upper(wrong, len(said), 0.05)):.4f}",
                     f"{binom.sf(wrong - 1, len(said), alpha):.3g}"]
                )  # fmt: skip
    return markdown(
        ["rule", "sigma", "image-radius pairs", "answers", "the certified class", "no answer", "another class",
         "95% upper limit of its share", f"p-value that it is more than {alpha:g}"],
        cells,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""What the rows leave out: AutoAttack itself, all classes at once, transfer between the levels of the tree.

    python -m benchmarks.finetune.full emoji --variants tecoa,tree --images 40

Of the sets with a half of the classes left out it is AutoAttack on that half, told apart among its own names.
Variants are tuned again, as for their rows of seed 0 (same seed, same model), and must be right on the same images.
Measured things are kept beside the rows and not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import exit_code_of, markdown
from robustvlm.attacks import Goal, Misclassify, Superclass
from robustvlm.core.files import write_text
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.stats import rate

from .measure import Images, predictions_when_attacked, right_when_attacked, right_when_clean
from .options import arguments, open_set, plan_of, variants_of
from .rows import Plan, classifier_of, clean_and_pgd, training_images, tune
from .sets import BenchmarkSet
from .tables import share
from .variants import VARIANTS


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing and print both tables."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--images", type=int, default=40, help="images under AutoAttack")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure what is missing of a set's variants and print both tables."""
    torch.set_num_threads(1)
    folder: Path = options.out / options.set
    plan, benchmark = plan_of(options), open_set(options)
    found = [_kept(folder, key, benchmark, plan, options) for key in variants_of(options)]
    halved = any(condition.left_out for condition in benchmark.transfer)
    print(_on_left_out(found) if halved else _autoattack(found) + "\n\n" + _matrices(found))


def _kept(folder: Path, key: str, benchmark: BenchmarkSet, plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    path = folder / f"full-{key}.json"
    if not path.exists():
        row = json.loads((folder / f"{key}-seed0.json").read_text(encoding="utf-8"))
        write_text(path, json.dumps(_measured(key, row, benchmark, plan, options.images), indent=1) + "\n")
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept["images"] != options.images:
        raise UserError(f"'{path}' was made with --images {kept['images']}: pass that, or move the file away")
    return kept


def _measured(key: str, row: dict[str, Any], benchmark: BenchmarkSet, plan: Plan, count: int) -> dict[str, Any]:
    vlm, variant = load_model(benchmark.model), VARIANTS[key]
    if variant.method is not None:
        tune(vlm, benchmark, variant, 0, training_images(benchmark, 0, plan), plan)
    held = next((condition for condition in benchmark.transfer if condition.left_out), None)
    condition, kept = (benchmark.seen, row) if held is None else (held, row["transfer"][held.name])
    classifier = classifier_of(vlm, condition, benchmark.train.templates)
    images = condition.images
    clean = right_when_clean(classifier, images)
    if "".join("1" if right else "0" for right in clean) != kept["clean"]:
        raise UserError(f"{key}: the model tuned again is not that of the row: measure both with the same options")
    standard = right_when_attacked(classifier, images.first(count), "standard", plan.threat, precision=plan.precision)
    found = {"title": variant.title, "images": count, "clean": clean[:count], "standard": standard}
    if held is not None:
        return {**found, "pgd": [bit == "1" for bit in kept["pgd"][:count]]}
    return {
        **found,
        "ensemble": [bit == "1" for bit in row["ensemble"][:count]],
        "together": clean_and_pgd(vlm, benchmark.together, benchmark.train.templates, plan),
        "levels": _transfer(classifier, images.first(plan.attacked), benchmark, plan),
    }


def _transfer(classifier: ZeroShot, images: Images, benchmark: BenchmarkSet, plan: Plan) -> list[list[float]]:
    """Return robust accuracy under PGD-20 against level i (rows), scored at level j (columns)."""
    tree = benchmark.forest[0]
    groups = [torch.tensor(tree.superclass_labels(level)) for level in range(tree.levels - 1)]
    goals: list[Goal] = [Misclassify(), *(Superclass(of, str(level)) for level, of in enumerate(groups) if level)]
    found = []
    for goal in goals:
        guesses = predictions_when_attacked(classifier, images, "pgd", plan.threat, goal, precision=plan.precision)
        found.append([float((of[guesses] == of[images.labels]).float().mean()) for of in groups])
    return found


def _autoattack(found: list[dict[str, Any]]) -> str:
    lines = []
    for kept in found:
        shares = [share("".join("1" if right else "0" for right in kept[name])) for name in ("clean", "ensemble")]
        robust = rate(sum(kept["standard"]), len(kept["standard"]))
        cells = [f"{value:.3f}" for value in shares]
        cells.append(f"{robust.value:.3f} ({robust.low:.3f} to {robust.high:.3f})")
        lines.append([kept["title"], *cells, *(f"{share(kept['together'][name]):.3f}" for name in ("clean", "pgd"))])
    return markdown(["model", "clean", "ensemble", "AutoAttack", "all classes: clean", "all classes: PGD-20"], lines)


def _on_left_out(found: list[dict[str, Any]]) -> str:
    lines = []
    for kept in found:
        robust = rate(sum(kept["standard"]), len(kept["standard"]))
        cells = [f"{sum(kept[name]) / len(kept[name]):.3f}" for name in ("clean", "pgd")]
        lines.append([kept["title"], *cells, f"{robust.value:.3f} ({robust.low:.3f} to {robust.high:.3f})"])
    return markdown(["left-out half alone", "clean", "PGD-20", "AutoAttack"], lines)


def _matrices(found: list[dict[str, Any]]) -> str:
    levels = len(found[0]["levels"])
    header = ["model", *(f"{i} at {j}" for i in range(levels) for j in range(levels))]
    return markdown(header, [[kept["title"], *(f"{x:.3f}" for row in kept["levels"] for x in row)] for kept in found])


if __name__ == "__main__":
    sys.exit(main())

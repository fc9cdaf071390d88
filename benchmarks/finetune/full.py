"""What the rows leave out: AutoAttack itself, all classes at once, transfer between the levels of the tree.

    python -m benchmarks.finetune.full emoji --seeds 0 --variants tecoa,tree --images 40

Of the sets with a half of the classes left out it is AutoAttack on that half, told apart among its own names.
Variants are tuned again, as for their rows (same seeds, same model), and must be right on the same images.
Measured things are kept beside the rows and not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import exit_code_of, markdown
from robustvlm.attacks import Goal, Misclassify, Superclass
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.errors import UserError
from robustvlm.models import load_model
from robustvlm.stats import rate
from robustvlm.training import TrainingImages

from .kept import Kept, kept, made_with
from .measure import Images, predictions_when_attacked, right_when_attacked, right_when_clean
from .options import arguments, open_set, plan_of, variants_of
from .rows import Plan, bits, classifier_of, clean_and_pgd, make_row, training_images, tune
from .sets import BenchmarkSet
from .tables import Compared, Row, adjusted, against, mean_and_range, share
from .variants import VARIANTS, Variant


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing and print both tables."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--images", type=int, default=40, help="images under AutoAttack")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Measure what is missing of a set's variants and print the tables."""
    torch.set_num_threads(1)
    plan, benchmark = plan_of(options), open_set(options)
    halved = any(condition.left_out for condition in benchmark.transfer)
    most = plan.attacked if halved else plan.ensemble
    if options.images > most:
        beside = f"--attacked {plan.attacked}" if halved else f"--ensemble {plan.ensemble}"
        raise UserError(f"--images {options.images} is more than the {beside} of the rows: the columns would differ")
    folder: Path = options.out / options.set
    of = made_with(benchmark, plan)
    found: dict[str, list[Kept]] = {}
    for seed in map(int, options.seeds.split(",")):
        data = training_images(benchmark, seed, plan)
        for key in variants_of(options):
            if seed and VARIANTS[key].method is None:
                continue
            variant, name = VARIANTS[key], f"{key}-seed{seed}.json"
            row = kept(folder / name, of, variant, partial(make_row, benchmark, variant, seed, data, plan))
            measure = partial(_measured, variant, row, benchmark, plan, data, options.images)
            one = kept(folder / "full" / name, {**of, "AutoAttack": options.images}, variant, measure)
            found.setdefault(key, []).append({**one, "seed": seed})
            print(f"{options.set} {key} seed {seed}", file=sys.stderr, flush=True)
    print(on_left_out(found) if halved else _autoattack(found) + "\n\n" + _matrices(found))


def _measured(
    variant: Variant, row: Row, benchmark: BenchmarkSet, plan: Plan, data: TrainingImages, count: int
) -> Kept:
    vlm = load_model(benchmark.model)
    if variant.method is not None:
        tune(vlm, benchmark, variant, row["seed"], data, plan)
    held = next((condition for condition in benchmark.transfer if condition.left_out), None)
    condition, told = (benchmark.seen, row) if held is None else (held, row["transfer"][held.name])
    classifier = classifier_of(vlm, condition, benchmark.train.templates)
    images = condition.images
    clean = bits(right_when_clean(classifier, images))
    if clean != told["clean"]:
        raise UserError(
            f"{variant.title}: the model tuned again is not that of the row: measure both with the same options"
        )
    standard = right_when_attacked(classifier, images.first(count), "standard", plan.threat, precision=plan.precision)
    found = {"title": variant.title, "clean": clean[:count], "standard": bits(standard)}
    if held is not None:
        return {**found, "pgd": told["pgd"][:count]}
    return {
        **found,
        "ensemble": row["ensemble"][:count],
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


def _autoattack(found: Mapping[str, list[Kept]]) -> str:
    header = ["model", "clean", "ensemble", "AutoAttack", "all classes: clean", "all classes: PGD-20"]
    lines = []
    for seeds in found.values():
        columns = [[one[name] for one in seeds] for name in ("clean", "ensemble")]
        among = [[one["together"][name] for one in seeds] for name in ("clean", "pgd")]
        cells = [mean_and_range([share(told) for told in column]) for column in (*columns, *among)]
        lines.append([seeds[0]["title"], *cells[:2], _robust(seeds), *cells[2:]])
    return markdown(header, lines)


def on_left_out(found: Mapping[str, list[Kept]]) -> str:
    """Return AutoAttack's table; the paired test is that of the other tables (an image is one observation)."""
    lines: list[list[str | Compared]] = []
    for key, seeds in found.items():
        cells = [mean_and_range([share(one[name]) for one in seeds]) for name in ("clean", "pgd")]
        compared = against(key, seeds, found.get("tecoa", []), [lambda one: one["standard"]])
        lines.append([seeds[0]["title"], *cells, _robust(seeds), compared, str(len(seeds))])
    header = ["left-out half alone", "clean", "PGD-20", "AutoAttack", "against TeCoA", "seeds"]
    return markdown(header, adjusted(lines))


def _robust(seeds: Sequence[Kept]) -> str:
    """Return the mean over seeds with half its range, of one seed with the interval over images."""
    if len(seeds) > 1:
        return mean_and_range([share(one["standard"]) for one in seeds])
    robust = rate(seeds[0]["standard"].count("1"), len(seeds[0]["standard"]))
    return f"{robust.value:.3f} ({robust.low:.3f} to {robust.high:.3f})"


def _matrices(found: Mapping[str, list[Kept]]) -> str:
    first = [seeds[0] for seeds in found.values()]
    levels = len(first[0]["levels"])
    header = ["model, first seed", *(f"{i} at {j}" for i in range(levels) for j in range(levels))]
    return markdown(header, [[one["title"], *(f"{x:.3f}" for row in one["levels"] for x in row)] for one in first])


if __name__ == "__main__":
    sys.exit(main())

r"""Settings of the methods on validation data: what the defaults and the explanations rest on.

    python -m benchmarks.finetune.trials cifar10 --train TRAIN.parquet --test TEST.parquet \
        tecoa tree tree:depth=2 tree:negatives=False,vicinity=0 ucat:weight=10

A trial is a variant of the benchmark, with changes after a colon, tuned as there. It is measured on training images of
CIFAR-10 that no trial is tuned on (the base model was trained on all of them), or on the bundled set's validation
style, which nothing was trained on; no test image is seen. Outcomes are kept in --out and not made again.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import exit_code_of, markdown
from robustvlm.core.object_graph import fingerprint
from robustvlm.data import open_data
from robustvlm.data.source import UNKNOWN, Sample, select
from robustvlm.defenses.finetune import HierarchicalOptions
from robustvlm.errors import UserError, nearest
from robustvlm.models import load_model

from .kept import kept, made_with
from .measure import Images, right_when_attacked, right_when_clean
from .options import arguments, plan_of
from .rows import Plan, classifier_of, training_images, tune
from .sets import BenchmarkSet, cifar10, emoji, read_images
from .tables import mean_and_range, share
from .variants import VARIANTS, Variant

COLUMNS = ("clean", "PGD-20", "by name, clean", "by name, PGD-20")


@dataclass(frozen=True)
class Held:
    """Validation images for clean accuracy, and how many of them are attacked."""

    images: Images
    attacked: int


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(_arguments(argv)))


def run(options: argparse.Namespace) -> None:
    """Run the trials that are missing and print all that were asked for."""
    torch.set_num_threads(1)
    plan = replace(plan_of(options), ensemble=0)  # which no trial is put under
    benchmark, held = _open(options)
    folder: Path = options.out / options.set
    of = made_with(benchmark, plan, validation=fingerprint(vars(held.images)))
    lines = []
    for trial in options.trials:
        variant, found = _variant(trial), []
        for seed in map(int, options.seeds.split(",")):
            path = folder / f"{trial.replace(':', '-')}-steps{plan.steps}-seed{seed}.json"
            found.append(kept(path, of, variant, partial(_measured, variant, seed, benchmark, held, plan)))
        lines.append([trial, *(mean_and_range([share(bits[column]) for bits in found]) for column in COLUMNS)])
        print("  ".join(lines[-1]), file=sys.stderr, flush=True)
    print(markdown(["trial", *COLUMNS], lines))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("trials", nargs="+", metavar="VARIANT[:OPTION=VALUE,...]")
    parser.set_defaults(out=Path("runs/finetune-trials"), seeds="0", attacked=400)
    return parser.parse_args(argv)


def _variant(trial: str) -> Variant:
    key, _, changes = trial.partition(":")
    if key not in VARIANTS:
        raise UserError(f"unknown variant '{key}': {nearest(key, VARIANTS)}")
    found = VARIANTS[key]
    if not changes:
        return found
    new: Mapping[str, Any] = {
        name: ast.literal_eval(value) for name, _, value in (item.partition("=") for item in changes.split(","))
    }
    if found.method != "hierarchical":
        return replace(found, title=trial, options={**found.options, **new})
    base: HierarchicalOptions = found.options.get("options") or HierarchicalOptions()
    return replace(found, title=trial, options={"options": replace(base, **new)})


def _measured(variant: Variant, seed: int, benchmark: BenchmarkSet, held: Held, plan: Plan) -> dict[str, str]:
    vlm = load_model(benchmark.model)
    if variant.method is not None:
        tune(vlm, benchmark, variant, seed, training_images(benchmark, seed, plan), plan)
    tree, templates = benchmark.forest[0], benchmark.train.templates
    groups = torch.tensor(tree.superclass_labels(1))
    found = {}
    for prefix, names, labels in (
        ("", benchmark.train.class_names, held.images.labels),
        ("by name, ", tree.level_names(1), groups[held.images.labels]),
    ):
        images = Images(held.images.pixels, labels, held.images.ids)
        classifier = classifier_of(vlm, replace(benchmark.seen, class_names=names), templates)
        attacked = right_when_attacked(
            classifier, images.first(held.attacked), "pgd", plan.threat, precision=plan.precision
        )
        found[f"{prefix}clean"] = "".join("1" if right else "0" for right in right_when_clean(classifier, images))
        found[f"{prefix}PGD-20"] = "".join("1" if right else "0" for right in attacked)
    return found


def _open(options: argparse.Namespace) -> tuple[BenchmarkSet, Held]:
    if options.set == "emoji":
        benchmark = emoji(1)
        styled = open_data("emoji?split=val&copies=4")
        names = select(styled.ids() or [], options.clean_images)
        return benchmark, Held(read_images(styled, 64, names), options.attacked)
    if options.set != "cifar10":
        raise UserError(f"'{options.set}' has no validation images: trials are on emoji or cifar10")
    if options.train is None or options.test is None:
        raise UserError("CIFAR-10 is not bundled: pass its Parquet files, --train TRAIN.parquet --test TEST.parquet")
    benchmark = cifar10(options.train, options.test, 1)
    ids = [item.id for item in benchmark.train.samples() if isinstance(item, Sample) and item.label != UNKNOWN]
    # What training takes is the start of the same order.
    trained = set(select(benchmark.train.ids() or [], options.train_images))
    chosen = [name for name in select(ids, None) if name not in trained]
    return benchmark, Held(read_images(benchmark.train, 32, chosen[: options.clean_images]), options.attacked)


if __name__ == "__main__":
    sys.exit(main())

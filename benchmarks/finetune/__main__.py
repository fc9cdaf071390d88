"""Every fine-tuning method at equal budget, on CIFAR-10 and on the bundled set.

    python -m benchmarks.finetune cifar10 --train TRAIN.parquet --test TEST.parquet
    python -m benchmarks.finetune emoji

Rows are kept in --out and not made again; the tables are printed from them. The CIFAR-10 model is that of
benchmarks/cifar10 (ROBUSTVLM_CIFAR10 names its folder).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from robustvlm.attacks import parse_eps
from robustvlm.errors import UserError, nearest
from robustvlm.runs.files import write_text

from .cost import costs
from .rows import Plan, make_row, training_images
from .sets import BenchmarkSet, cifar10, emoji
from .tables import read_rows, tables
from .variants import MAIN, VARIANTS

ENSEMBLE = "apgd-ce:steps=50,apgd-t:steps=50:targets=3"
"""The FARE protocol at half its steps and a third of its targets."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=("cifar10", "emoji"))
    parser.add_argument("--train", type=Path, help="CIFAR-10 training Parquet file")
    parser.add_argument("--test", type=Path, help="CIFAR-10 test Parquet file")
    parser.add_argument("--variants", default="all", help=f"main, all, or some of {','.join(VARIANTS)}")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--inner-steps", type=int, default=2)
    parser.add_argument("--eps", default="2/255", help="of training and evaluation, Linf")
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--clean-images", type=int, default=1000, help="images per condition for clean accuracy")
    parser.add_argument("--attacked", type=int, default=200, help="images per condition under PGD-20")
    parser.add_argument("--ensemble", type=int, default=100, help="images under --ensemble-attack")
    parser.add_argument("--ensemble-attack", default=ENSEMBLE, help=f"default {ENSEMBLE}; AutoAttack is standard")
    parser.add_argument("--cost-rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-benchmark"))
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing and print the tables."""
    torch.set_num_threads(1)
    chosen = list({"main": MAIN, "all": VARIANTS}.get(options.variants, options.variants.split(",")))
    for key in chosen:
        if key not in VARIANTS:
            raise UserError(f"unknown variant '{key}': {nearest(key, VARIANTS)}")
    ((_, eps),) = parse_eps(options.eps)
    plan = Plan(
        eps=eps,
        steps=options.steps,
        inner_steps=options.inner_steps,
        train_images=options.train_images,
        attacked=options.attacked,
        ensemble=options.ensemble,
        ensemble_attack=options.ensemble_attack,
    )
    benchmark = _benchmark(options)
    folder: Path = options.out / options.set
    folder.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        data = training_images(benchmark, seed, plan)
        for key in chosen:
            path = folder / f"{key}-seed{seed}.json"
            if path.exists() or (seed and VARIANTS[key].method is None):
                continue
            write_text(path, json.dumps(make_row(benchmark, VARIANTS[key], seed, data, plan), indent=1) + "\n")
            print(f"{options.set} {key} seed {seed}", file=sys.stderr, flush=True)
    spent_path = folder / "cost.json"
    if not spent_path.exists() and options.cost_rounds:
        spent = costs(benchmark, VARIANTS, training_images(benchmark, 0, plan), plan, options.cost_rounds)
        write_text(spent_path, json.dumps(spent, indent=1) + "\n")
    spent = json.loads(spent_path.read_text(encoding="utf-8")) if spent_path.exists() else {}
    print(tables(read_rows(folder), list(VARIANTS), spent))


def _benchmark(options: argparse.Namespace) -> BenchmarkSet:
    if options.set == "emoji":
        return emoji(options.clean_images)
    if options.train is None or options.test is None:
        raise UserError("CIFAR-10 is not bundled: pass its Parquet files, --train TRAIN.parquet --test TEST.parquet")
    return cifar10(options.train, options.test, options.clean_images)


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    try:
        run(_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

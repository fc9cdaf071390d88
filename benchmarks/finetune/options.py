"""The options that all measurements of fine-tuning share, and what they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustvlm.attacks import parse_eps
from robustvlm.errors import UserError, nearest

from .halves import lit_cifar10, lit_emoji
from .rows import Plan
from .sets import BenchmarkSet, cifar10, emoji
from .variants import MAIN, VARIANTS

ENSEMBLE = "apgd-ce:steps=50,apgd-t:steps=50:targets=3"
"""The FARE protocol at half its steps and a third of its targets."""


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of the options that all measurements share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("cifar10", "emoji", "lit-cifar10", "lit-emoji"))
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
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 (for CPUs without avx512_bf16 or AMX)")
    parser.add_argument("--cost-rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-benchmark"))
    return parser


def variants_of(options: argparse.Namespace) -> list[str]:
    """Return the keys of the variants the options name."""
    # The teacher of a variant is a model of the bundled set; halves of that set have one tree.
    every = [
        key
        for key, one in VARIANTS.items()
        if (options.set == "emoji" or one.teacher is None) and not (options.set == "lit-emoji" and one.forest)
    ]
    chosen = list({"main": MAIN, "all": every}.get(options.variants, options.variants.split(",")))
    for key in chosen:
        if key not in VARIANTS:
            raise UserError(f"unknown variant '{key}': {nearest(key, VARIANTS)}")
    return chosen


def plan_of(options: argparse.Namespace) -> Plan:
    """Return how much of everything the options ask for."""
    ((_, eps),) = parse_eps(options.eps)
    return Plan(
        eps=eps,
        steps=options.steps,
        inner_steps=options.inner_steps,
        train_images=options.train_images,
        attacked=options.attacked,
        ensemble=options.ensemble,
        ensemble_attack=options.ensemble_attack,
        precision="fp32" if options.fp32 else "bf16",
    )


def open_set(options: argparse.Namespace) -> BenchmarkSet:
    """Return the set the options name."""
    if options.set in ("emoji", "lit-emoji"):
        return (emoji if options.set == "emoji" else lit_emoji)(options.clean_images)
    if options.train is None or options.test is None:
        raise UserError("CIFAR-10 is not bundled: pass its Parquet files, --train TRAIN.parquet --test TEST.parquet")
    return (cifar10 if options.set == "cifar10" else lit_cifar10)(options.train, options.test, options.clean_images)

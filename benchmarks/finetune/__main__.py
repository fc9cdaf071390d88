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
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import exit_code_of
from robustvlm.core.files import write_text

from .cost import costs
from .kept import kept, made_with
from .options import arguments, open_set, plan_of, variants_of
from .rows import make_row, training_images
from .tables import read_rows, tables
from .variants import VARIANTS


def run(options: argparse.Namespace) -> None:
    """Make the rows that are missing and print the tables."""
    torch.set_num_threads(1)
    chosen, plan, benchmark = variants_of(options), plan_of(options), open_set(options)
    folder: Path = options.out / options.set
    of = made_with(benchmark, plan)
    for seed in map(int, options.seeds.split(",")):
        data = training_images(benchmark, seed, plan)
        for key in chosen:
            if seed and VARIANTS[key].method is None:
                continue
            variant, path = VARIANTS[key], folder / f"{key}-seed{seed}.json"
            kept(path, of, variant, partial(make_row, benchmark, variant, seed, data, plan))
            print(f"{options.set} {key} seed {seed}", file=sys.stderr, flush=True)
    spent_path = folder / "cost.json"
    if not spent_path.exists() and options.cost_rounds:
        spent = costs(benchmark, VARIANTS, training_images(benchmark, 0, plan), plan, options.cost_rounds)
        write_text(spent_path, json.dumps(spent, indent=1) + "\n")
    spent = json.loads(spent_path.read_text(encoding="utf-8")) if spent_path.exists() else {}
    print(tables(read_rows(folder), list(VARIANTS), spent))


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(arguments(__doc__ or "").parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

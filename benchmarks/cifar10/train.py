"""Train the CIFAR-10 CLIP, clean or adversarially.

python -m benchmarks.cifar10.train --train TRAIN.parquet --test TEST.parquet --out runs/cifar10
python -m benchmarks.cifar10.train ... --out runs/cifar10_robust --robust --start runs/cifar10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import exit_code_of
from robustvlm.errors import UserError

from .data import read_images
from .evaluate import measure
from .fit import Recipe, fit
from .model import CifarCLIP, ModelConfig, load, save


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar10.train", description="Train the CIFAR-10 CLIP, clean or adversarially."
    )
    parser.add_argument("--train", type=Path, required=True, help="training Parquet file (Hugging Face image format)")
    parser.add_argument("--test", type=Path, required=True, help="test Parquet file")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder for weights and metrics")
    parser.add_argument("--robust", action="store_true", help="fine-tune adversarially from --start")
    parser.add_argument("--start", type=Path, help="run folder to start from (needed with --robust)")
    parser.add_argument("--eps", type=float, default=4, help="training radius of --robust, in 255ths (default 4)")
    parser.add_argument("--attack-steps", type=int, default=1, help="PGD steps of --robust (default 1: FGSM-RS)")
    parser.add_argument("--epochs", type=float, help="default: 18 clean, 2 robust")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 5e-3 clean, 2e-3 robust)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16, as on CPUs without instructions for it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 (avx512_bf16 or AMX); without, autocast is five times slower."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def run(options: argparse.Namespace) -> None:
    """Read the data, train, measure and write the run folder."""
    if options.robust and options.start is None:
        raise UserError("--robust fine-tunes a trained model: pass its folder, for example --start runs/cifar10")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    images = read_images(options.train, cache=options.out)
    test = read_images(options.test, cache=options.out)
    recipe = Recipe(
        epochs=options.epochs or (2 if options.robust else 18),
        lr=options.lr or (2e-3 if options.robust else 5e-3),
        eps=options.eps / 255 if options.robust else 0.0,
        attack_steps=options.attack_steps,
        bf16=not options.fp32 and has_bfloat16(),
        seed=options.seed,
    )
    model = load(options.start) if options.start else CifarCLIP(ModelConfig())
    model = fit(model.to(memory_format=torch.channels_last), images, test, recipe, out=options.out)
    save(model, options.out)
    spent = {"train_seconds": round(time.perf_counter() - started), "cpu_seconds": round(time.process_time())}
    metrics = {**spent, "threads": options.threads, **asdict(recipe)}
    metrics |= measure(model, test)
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

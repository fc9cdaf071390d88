"""What the memory layout of views costs: gradients through a defence with its pixels as they come and channels last.

    python -m benchmarks.zoo.layout tiny+vote:8 tiny+tte:5 tiny+dbd

Both are timed in turns. All columns are medians over the rounds, the last of what each round saved.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

import robustvlm as rv
from benchmarks.common import exit_code_of, markdown
from robustvlm.attacks.objectives import objective
from robustvlm.attacks.oracle import Oracle
from robustvlm.core.size import sides
from robustvlm.defenses.zoo.wrap import counted_passes, laid_as
from robustvlm.report.words import percent

Layout = Callable[[Tensor, Tensor], Tensor]


def _as_they_come(_: Tensor, pixels: Tensor) -> Tensor:
    return pixels


def rate_of(oracle: Oracle, pixels: Tensor, layout: Layout) -> float:
    """Return passes a second through the encoder while one gradient is taken of every image [N, 3, S, S]."""
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    with patch("robustvlm.defenses.zoo.wrap.laid_as", layout), counted_passes(oracle.model) as seen:
        began = time.perf_counter()
        oracle.gradient(pixels, objective("ce"), labels, labels)
        return (seen.forward + seen.backward) / (time.perf_counter() - began)


def measured(spec: str, *, images: int, rounds: int) -> list[str]:
    """Return the row of one model: passes a second in either layout, and what the second saves of the first's time."""
    source = rv.open_data("emoji")
    model = rv.load_classifier(spec, source.class_names, source.templates)
    oracle, pixels = Oracle(model), torch.rand(images, 3, *sides(model.image_size))
    for layout in (_as_they_come, laid_as):  # the first calls pay for what is made once
        rate_of(oracle, pixels, layout)
    rates = [(rate_of(oracle, pixels, _as_they_come), rate_of(oracle, pixels, laid_as)) for _ in range(rounds)]
    before, after = (median(column) for column in zip(*rates, strict=True))
    return [f"`{spec}`", f"{before:.0f}", f"{after:.0f}", percent(1 - median(old / new for old, new in rates))]


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.layout", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", help="convolutional models with a defence")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(argv)
    if given.rounds < 1 or given.images < 1:
        parser.error("--rounds and --images are 1 or more")
    heads = ["model", "passes a second, as they come", "channels last", "time saved"]
    return exit_code_of(
        lambda: print(
            markdown(heads, [measured(spec, images=given.images, rounds=given.rounds) for spec in given.models])
        )
    )


if __name__ == "__main__":
    sys.exit(main())

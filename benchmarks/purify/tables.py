"""The tables of `benchmarks.purify.scores`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import markdown
from robustvlm.stats import mcnemar_exact

NAMES = {"encoder": "encoder alone", "mapper": "+ mapper", "purifier": "+ purifier", "both": "+ both"}
EPS = (0.1, 0.25, 0.5)


def print_tables(lines: Sequence[dict[str, Any]]) -> None:
    """Print a table for every model and number of copies: means over images, and half the distance between seeds."""
    for label, copies in dict.fromkeys((line["label"], line["n"]) for line in lines):
        mine = [line for line in lines if (line["label"], line["n"]) == (label, copies)]
        images, seeds = len({line["image"] for line in mine}), sorted({line["seed"] for line in mine})
        print(f"\n**{label}**: {images} images, {copies} copies, seeds {', '.join(map(str, seeds))}\n")
        header = ["noise", "", "score", *(f"cos at {e}" for e in EPS), *(f"cos to f(x) at {e}" for e in EPS)]
        header += ["radius", "right", "class radius", "p"]
        sigmas = sorted({line["sigma"] for line in mine})
        print(markdown(header, [row for sigma in sigmas for row in _rows(mine, sigma)]))


def _rows(mine: list[dict[str, Any]], sigma: float) -> list[list[str]]:
    table = []
    for variant, name in NAMES.items():
        some = [line for line in mine if line["sigma"] == sigma and line["variant"] == variant]
        if not some:
            continue
        values = [
            lambda line: line["score"],
            *(lambda line, key=f"cos@{e}": line[key] for e in EPS),
            *(lambda line, key=f"anchored@{e}": line[key] for e in EPS),
            lambda line: line["radius"],
            lambda line: float(line["right"]),
            # The average certified radius: nothing where the certified class is the wrong one.
            lambda line: line["class_radius"] * line["pilot_right"],
        ]
        table.append([str(sigma), name, *(_over_seeds(some, value) for value in values), _p_value(mine, some, sigma)])
    return table


def _over_seeds(some: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    seeds = sorted({line["seed"] for line in some})
    means = [np.mean([value(line) for line in some if line["seed"] == seed]) for seed in seeds]
    half = (max(means) - min(means)) / 2
    return f"{np.mean(means):.3f}" + (f" ±{half:.3f}" if half >= 0.0005 else "")


def _p_value(mine: list[dict[str, Any]], some: list[dict[str, Any]], sigma: float) -> str:
    """Return the paired exact test of accuracy against the encoder alone, for the first seed."""
    alone = {line["image"]: line["right"] for line in mine if line["sigma"] == sigma and line["variant"] == "encoder"}
    first = min(line["seed"] for line in some)
    pairs = [(line["right"], alone[line["image"]]) for line in some if line["seed"] == first and line["image"] in alone]
    if not pairs or some[0]["variant"] == "encoder":
        return ""
    return f"{mcnemar_exact([a for a, _ in pairs], [b for _, b in pairs]).p_value:.1g}"

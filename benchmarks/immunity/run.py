"""Measure the immunised classifier, its ablations and training-free scores; `python -m benchmarks.immunity.run`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustvlm.detect import auroc_interval
from robustvlm.detect.metrics import auroc, fpr_at_tpr
from robustvlm.stats import mean

from .sets import Task, cifar_tasks, describe, emoji_task
from .variants import VARIANTS, Scored, baselines, possible, scored

Row = dict[str, Any]


def rows_of(task: Task, seeds: Sequence[int]) -> list[Row]:
    """Return one row a score and seed; scores that need no training have one seed."""
    found = [row(task, name, 0, one) for name, one in baselines(task).items()]
    for variant in VARIANTS:
        if not possible(task, variant):
            print(f"{task.name}: '{variant.name}' has no antibodies and is left out", flush=True)
            continue
        for seed in seeds:
            found.append(row(task, variant.name, seed, scored(task, variant, seed)))
    return found


def row(task: Task, name: str, seed: int, one: Scored) -> Row:
    """Return the numbers of one score: AUROC and FPR95 against each unknown set, closed-set accuracy."""
    sets = {}
    for key, other in one.unknown.items():
        interval = auroc_interval(
            one.known, other, known_groups=task.known.groups, unknown_groups=task.unknown[key].groups
        )
        sets[key] = {
            "auroc": auroc(one.known, other),
            "low": interval.low,
            "high": interval.high,
            "fpr95": fpr_at_tpr(one.known, other),
            "accepted": one.accepted.get(key),
        }
    return {
        "task": task.name,
        "score": name,
        "seed": seed,
        "accuracy": float(np.mean(one.right)),
        "accepted_known": one.accepted.get("known"),
        "sets": sets,
        "note": one.note,
    }


def table(found: Sequence[Row]) -> str:
    """Return a Markdown table: means over tasks and seeds, and the spread over them (or DeLong's interval of one)."""
    names = list(dict.fromkeys(item["score"] for item in found))
    keys = list(dict.fromkeys(key for item in found for key in item["sets"]))
    tasks = len({item["task"] for item in found})
    head = ["score", *(f"AUROC {key}" for key in keys), *(f"FPR95 {key}" for key in keys), "accuracy", "accepted"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        own = [item for item in found if item["score"] == name]
        cells = [name]
        for key in keys:
            values = [item["sets"][key]["auroc"] for item in own]
            one = own[0]["sets"][key]
            if tasks == 1:
                cells.append(f"{np.mean(values):.3f} ({one['low']:.3f} to {one['high']:.3f})")
            else:
                by_task = [
                    np.mean([i["sets"][key]["auroc"] for i in own if i["task"] == t])
                    for t in sorted({i["task"] for i in own})
                ]
                spread = mean([float(value) for value in by_task])
                cells.append(f"{spread.value:.3f} ({spread.low:.3f} to {spread.high:.3f})")
        cells += [f"{np.mean([item['sets'][key]['fpr95'] for item in own]):.3f}" for key in keys]
        cells.append(f"{np.mean([item['accuracy'] for item in own]):.3f}")
        accepted = [item["accepted_known"] for item in own if item["accepted_known"] is not None]
        cells.append(f"{np.mean(accepted):.3f}" if accepted else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["emoji", "cifar10"])
    parser.add_argument("--judge", choices=["val", "test"], default="test", help="emoji: the style that is judged")
    parser.add_argument("--cifar-train", help="labelled CIFAR-10 training images, as parquet:FILE")
    parser.add_argument("--cifar-test", help="labelled CIFAR-10 test images, as parquet:FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--features", type=Path, default=Path("runs/benchmark-immunity"), help="where features are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.which == "emoji":
        tasks = [emoji_task(given.features, given.judge)]
    else:
        if not given.cifar_train or not given.cifar_test:
            parser.error("cifar10 needs --cifar-train and --cifar-test")
        tasks = list(cifar_tasks(given.features, given.cifar_train, given.cifar_test))
    found: list[Row] = []
    for task in tasks:
        print(describe(task), flush=True)
        found += rows_of(task, range(given.seeds))
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

"""Measure the immunised classifier, its ablations and training-free scores; `python -m benchmarks.immunity.run`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import exit_code_of
from robustvlm.detect import auroc_interval
from robustvlm.detect.metrics import auroc, fpr_at_tpr
from robustvlm.stats import mean

from .sets import Task, cifar_tasks, describe, emoji_splits, emoji_task
from .variants import OF_SPLITS, VARIANTS, Scored, Variant, baselines, possible, scored

Row = dict[str, Any]


def rows_of(task: Task, seeds: Sequence[int], variants: Sequence[Variant] = VARIANTS) -> list[Row]:
    """Return one row a score and seed; scores that need no training have one seed."""
    found = [row(task, name, 0, one) for name, one in baselines(task).items()]
    for variant in variants:
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
    head += [f"{key} accepted" for key in keys]
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
                cells.append(_over_tasks(own, key, "auroc"))
        cells += [
            f"{np.mean([item['sets'][key]['fpr95'] for item in own]):.3f}"
            if tasks == 1
            else _over_tasks(own, key, "fpr95")
            for key in keys
        ]
        cells.append(f"{np.mean([item['accuracy'] for item in own]):.3f}")
        cells.append(f"{np.mean([item['accepted_known'] for item in own]):.3f}")
        cells += [f"{np.mean([item['sets'][key]['accepted'] for item in own]):.3f}" for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _over_tasks(own: Sequence[Row], key: str, what: str) -> str:
    """Return the mean over tasks of the means over seeds, with Student's interval."""
    spread = mean([float(value) for value in _by_task(own, key, what).values()], within=(0.0, 1.0))
    return f"{spread.value:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def _by_task(own: Sequence[Row], key: str, what: str) -> dict[str, float]:
    tasks = sorted({item["task"] for item in own})
    return {task: float(np.mean([item["sets"][key][what] for item in own if item["task"] == task])) for task in tasks}


def paired(found: Sequence[Row], name: str, others: Sequence[str]) -> str:
    """Return a Markdown table of what one score has more than others, paired over tasks, with Student's interval."""
    keys = list(dict.fromkeys(key for item in found for key in item["sets"]))
    columns = [(what, key) for what in ("auroc", "fpr95", "accepted") for key in keys]
    titles = {"auroc": "AUROC", "fpr95": "FPR95", "accepted": "accepted"}
    lines = ["| " + " | ".join([f"{name}, less", *(f"{titles[what]} {key}" for what, key in columns)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    mine = [item for item in found if item["score"] == name]
    for other in others:
        theirs = [item for item in found if item["score"] == other]
        cells = [other]
        for what, key in columns:
            rival = _by_task(theirs, key, what)
            gap = mean([value - rival[task] for task, value in _by_task(mine, key, what).items()])
            cells.append(f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["emoji", "splits", "cifar10"])
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
    elif given.which == "splits":
        tasks = list(emoji_splits(given.features))
    else:
        if not given.cifar_train or not given.cifar_test:
            parser.error("cifar10 needs --cifar-train and --cifar-test")
        tasks = list(cifar_tasks(given.features, given.cifar_train, given.cifar_test))
    found: list[Row] = []
    for task in tasks:
        print(describe(task), flush=True)
        found += rows_of(task, range(given.seeds), OF_SPLITS if given.which == "splits" else VARIANTS)
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if given.which == "splits":
        others = ["mcm", "max-logit", "energy", "gda", "neglabel", *(one.name for one in OF_SPLITS[1:])]
        print("\n" + paired(found, OF_SPLITS[0].name, others))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""From scores to Markdown rows: mean over seeds, with the smallest and largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from benchmarks.common import markdown
from robustvlm.commands.detect.scoring import score_all
from robustvlm.detect import SCORES, Supplies, make_scores
from robustvlm.detect.metrics import all_metrics

# By score and set of unknown images: AUROC and FPR95 of each seed.
Found = dict[str, dict[str, list[tuple[float, float]]]]


def judge(found: Found, name: str, known: Tensor, unknown: Mapping[str, Tensor]) -> None:
    """Add the metrics of one score, given its values on known images and on each set of unknown ones."""
    for other, values in unknown.items():
        metrics = all_metrics(known.double().numpy(), values.double().numpy())
        row = found.setdefault(name, {}).setdefault(other, [])
        row.append((float(metrics.auroc[0]), float(metrics.fpr95[0])))


def judge_all(found: Found, supplies: Supplies, known: Tensor, unknown: Mapping[str, Tensor]) -> None:
    """Add every score of the catalogue that these supplies allow, on features."""
    made, skipped = make_scores(SCORES, supplies)
    for item in skipped:
        print(f"left out {item.name}: {item.reason}")
    for name, detector in made.items():
        values = {other: score_all(detector, features) for other, features in unknown.items()}
        judge(found, SCORES[name].title, score_all(detector, known), values)


def table(found: Found, sets: Sequence[str]) -> str:
    """Return the table: AUROC / FPR95 by set, with the range over seeds where there are several."""
    header = ["score", *(f"{name}: AUROC" if part == 0 else f"{name}: FPR95" for name in sets for part in (0, 1))]
    rows = []
    for score, by_set in found.items():
        cells = [_cell([pair[part] for pair in by_set[name]]) for name in sets for part in (0, 1)]
        rows.append([score, *cells])
    return markdown(header, rows)


def subset(count: int, share: float, seed: int) -> Tensor:
    """Return a seeded choice of rows, ascending."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: max(2, round(share * count))].sort().values


def _cell(values: Sequence[float]) -> str:
    text = _number(fmean(values))
    if max(values) - min(values) < 5e-4:
        return text
    return f"{text} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.3f}".lstrip("0") if value < 1 else "1.00"

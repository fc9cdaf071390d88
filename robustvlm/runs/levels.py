"""Robust accuracy at every level of a class tree, and how attacks against one level do at the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from robustvlm.runs.verdicts import Rows, Verdicts, columns, verdicts
from robustvlm.stats import Rate, rate

# Recorded points of an image: eps and predicted class.
Points = dict[str, list[tuple[float, int]]]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LevelSummary(_Record):
    """Accuracy at one level of a class tree, unperturbed and at the points that the attacks recorded.

    An image counts when its predicted class lies in its label's superclass, unperturbed and at every recorded point.
    """

    name: str
    tree: str
    level: int
    superclasses: int
    clean_accuracy: Rate
    robust_accuracy: Rate


class TransferRow(_Record):
    """What is left at every level after attacks against one of them (or all at once)."""

    goal: str
    name: str
    robust_accuracy: list[Rate]


class LevelTransfer(_Record):
    """Attacks against level i (rows) scored at level j (columns); both from the classes up."""

    levels: list[str]
    clean_accuracy: list[Rate]
    rows: list[TransferRow]


@dataclass(frozen=True)
class Level:
    """A level of a tree: `of[k]` is the superclass of class k, numbered from 0."""

    tree: str
    level: int
    of: Sequence[int]
    several: bool = False

    @property
    def superclasses(self) -> int:
        return len(set(self.of))

    @property
    def name(self) -> str:
        where = f"{self.tree}, " if self.several else ""
        what = "classes" if self.level == 0 else f"level {self.level}"
        return f"{where}{what} ({self.superclasses})"

    def same(self, label: int, prediction: int) -> bool:
        """Whether a prediction lies in the label's superclass; rejected and failed images lie in none."""
        return label >= 0 and prediction >= 0 and self.of[label] == self.of[prediction]


def tree_levels(data: Mapping[str, Any]) -> list[Level]:
    """Return the levels that a run's manifest holds, those of the classes included; none without a tree."""
    found = data.get("levels") or []
    several = len({item["tree"] for item in found}) > 1
    return [Level(item["tree"], item["level"], item["of"], several) for item in found]


def level_summaries(rows: Rows, table: Verdicts, eps_index: int, levels: Sequence[Level]) -> list[LevelSummary]:
    """Return accuracy at every level after all attacks up to an eps, from the predictions at recorded points.

    Images on which nothing is decided count as wrong, as they do in robust accuracy.
    """
    points = _points(rows) if levels else {}
    return [
        LevelSummary(
            name=level.name,
            tree=level.tree,
            level=level.level,
            superclasses=level.superclasses,
            clean_accuracy=_clean(table, level),
            robust_accuracy=_robust(table, eps_index, level, points),
        )
        for level in levels
    ]


def level_transfer(
    rows: Rows, goals: Sequence[str], eps_index: int, levels: Sequence[Level], config: Mapping[str, Any]
) -> LevelTransfer:
    """Return the transfer matrix at one eps; `goals` are those attacked, in order."""
    found, clean = [], []
    # A goal is `superclass:LEVEL`, or `superclass:ROOT/LEVEL` where it is about one tree of several.
    root = goals[0].partition(":")[2].rpartition("/")[0]
    levels = [level for level in levels if level.tree == (root or levels[0].tree)]
    names = {str(level.level): level.name for level in levels} | {"all": "all levels at once"}
    for goal in goals:
        name = names.get(goal.partition(":")[2].rpartition("/")[2], goal)
        table = verdicts(rows, eps=config["eps"], attacks=config["attack"], goal=goal)
        points = _points(rows, goal)
        clean = [_clean(table, level) for level in levels]
        rates = [_robust(table, eps_index, level, points) for level in levels]
        found.append(TransferRow(goal=goal, name=name, robust_accuracy=rates))
    return LevelTransfer(levels=[level.name for level in levels], clean_accuracy=clean, rows=found)


def _points(rows: Rows, goal: str | None = None) -> Points:
    points: Points = defaultdict(list)
    fields = columns(rows, "image_id", "eps", "goal", "outcome", "steps", "adversarial_prediction")
    for image_id, eps, of, outcome, steps, prediction in fields:
        measured = outcome in ("fooled", "robust", "failed") or (outcome == "clean_wrong" and steps)
        if measured and goal in (None, of):
            points[image_id].append((float(eps), prediction))
    return points


def _clean(table: Verdicts, level: Level) -> Rate:
    right = sum(level.same(image.label, image.clean_prediction) for image in table.images)
    return rate(right, len(table.images))


def _robust(table: Verdicts, eps_index: int, level: Level, points: Points) -> Rate:
    eps, right = table.eps[eps_index], 0
    for image in table.images:
        if table.after(image, eps_index) == "undecided":
            continue
        seen = [image.clean_prediction, *(said for radius, said in points.get(image.image_id, ()) if radius <= eps)]
        right += all(level.same(image.label, prediction) for prediction in seen)
    return rate(right, len(table.images))

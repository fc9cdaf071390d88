"""Robust accuracy at every level of a class tree, and how attacks against one level do at the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustvlm.runs.records import LevelSummary, LevelTransfer, TransferRow
from robustvlm.runs.verdicts import NO_ANSWER, Rows, Verdicts, columns, verdicts
from robustvlm.stats import Rate, rate

# Recorded points of an image: eps and predicted class.
Points = dict[str, list[tuple[float, int]]]


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


def level_summaries(
    rows: Rows, table: Verdicts, eps_index: int, levels: Sequence[Level], *, waiting: int = 0
) -> list[LevelSummary]:
    """Return accuracy at every level after all attacks up to an eps, from the predictions at recorded points.

    Images on which nothing is decided, and `waiting` ones, count as wrong, as they do in robust accuracy.
    """
    points = _points(rows) if levels else {}
    unsettled = _unsettled(rows, table, eps_index) if levels else set()
    found = []
    for level in levels:
        least, most = _robust(table, eps_index, level, points, unsettled, waiting)
        found.append(
            LevelSummary(
                name=level.name,
                tree=level.tree,
                level=level.level,
                superclasses=level.superclasses,
                clean_accuracy=_clean(table, level, waiting),
                robust_accuracy=least,
                robust_accuracy_at_most=most,
            )
        )
    return found


def level_transfer(
    rows: Rows,
    goals: Sequence[str],
    eps_index: int,
    levels: Sequence[Level],
    config: Mapping[str, Any],
    *,
    waiting: int = 0,
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
        points, unsettled = _points(rows, goal), _unsettled(rows, table, eps_index, goal, everyone=True)
        clean = [_clean(table, level, waiting) for level in levels]
        bounds = [_robust(table, eps_index, level, points, unsettled, waiting) for level in levels]
        least, most = ([pair[side] for pair in bounds] for side in (0, 1))
        found.append(TransferRow(goal=goal, name=name, robust_accuracy=least, robust_accuracy_at_most=most))
    return LevelTransfer(levels=[level.name for level in levels], clean_accuracy=clean, rows=found)


def _points(rows: Rows, goal: str | None = None) -> Points:
    points: Points = defaultdict(list)
    fields = columns(rows, "image_id", "eps", "goal", "outcome", "steps", "adversarial_prediction")
    for image_id, eps, of, outcome, steps, prediction in fields:
        measured = outcome in ("fooled", "robust", "failed") or (outcome == "clean_wrong" and steps)
        if measured and goal in (None, of):
            points[image_id].append((float(eps), prediction))
    return points


def _unsettled(
    rows: Rows, table: Verdicts, eps_index: int, goal: str | None = None, *, everyone: bool = False
) -> set[str]:
    """Return the images of which more could still become known at this eps: attacks broke, or did not come to them.

    Where no image leaves at its first success, attacks after one are owed as well; with `everyone`, also to images on
    which the goal is reached unperturbed.
    """
    eps = table.eps[eps_index]
    found = {image.image_id for image in table.images if table.after(image, eps_index) == "undecided"}
    fields = columns(rows, "image_id", "eps", "goal", "outcome", "passes", "clean_prediction")
    for image_id, radius, of, outcome, passes, clean in fields:
        if radius > eps or goal not in (None, of):
            continue
        stays = everyone or of.partition(":")[0] == "feature"
        owed = outcome == "skipped" or (everyone and outcome == "clean_wrong" and not passes and clean != NO_ANSWER)
        if outcome == "undecided" or (stays and owed):
            found.add(image_id)
    return found


def _clean(table: Verdicts, level: Level, waiting: int) -> Rate:
    right = sum(level.same(image.label, image.clean_prediction) for image in table.images)
    return rate(right, len(table.images) + waiting)


def _robust(
    table: Verdicts, eps_index: int, level: Level, points: Points, unsettled: Collection[str], waiting: int
) -> tuple[Rate, Rate]:
    """Return accuracy at a level if no unsettled image counts, and if all count that nothing speaks against."""
    eps, least, most = table.eps[eps_index], 0, waiting
    for image in table.images:
        said = [said for radius, said in points.get(image.image_id, ()) if radius <= eps and said != NO_ANSWER]
        right = all(level.same(image.label, prediction) for prediction in [image.clean_prediction, *said])
        most += right
        least += right and image.image_id not in unsettled
    total = len(table.images) + waiting
    return rate(least, total), rate(most, total)

"""A finished attack run read back from its folder, and its findings in plain words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from robustvlm.attacks.goals import CLEAN, GoalWords, goal_words
from robustvlm.commands.attack.store import SCHEMA
from robustvlm.commands.attack.summary import EpsSummary, Summary
from robustvlm.commands.attack.verdicts import Verdicts, verdicts
from robustvlm.data.splits import group_of_run
from robustvlm.errors import UserError
from robustvlm.report.words import RANGE, ball, bounds, count_of, interval, number, percent, plain
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.records import read_rows, required
from robustvlm.runs.run import FinishedRun, not_ended, read_finished
from robustvlm.stats import Rate

COLUMNS = (
    "index",
    "image_id",
    "label",
    "clean_prediction",
    "attack",
    "eps",
    "outcome",
    "steps",
    "clean_margin",
    "margin",
)
"""The columns of results.parquet that a report reads."""

_GOAL = "goal"


class _Config(BaseModel):
    """The settings that a report reads, of this version and earlier ones."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    data: str
    norm: str
    eps: list[float]
    eps_text: list[str]
    attack: list[str]
    goal: str = "misclassify"
    goals: list[str] = ["misclassify"]
    second_opinion: str | None = None


class _Classes(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    class_names: list[str]


class _Needed(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    config: _Config
    data: _Classes


@dataclass(frozen=True)
class AttackedRun(FinishedRun[Summary]):
    """Manifest, summary and rows of one finished attack run; of several goals, the rows of the first."""

    rows: pa.Table

    @property
    def goal(self) -> str:
        """What a success was, to the letter: the goal, and the threshold that belongs to it."""
        threshold = self.summary.min_cos
        return self.summary.goal + (f" below {threshold:g}" if threshold is not None else "")

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, indexed by label."""
        names: list[str] = self.manifest["data"]["class_names"]
        return names

    @property
    def eps_texts(self) -> dict[float, str]:
        """How each eps is written, as the user gave it."""
        return {at.eps: at.eps_text for at in self.summary.per_eps}

    def verdicts(self) -> Verdicts:
        """Return the worst case per image; what it is a copy of, as far as its id tells it: rows do not store it."""
        config, group = self.manifest["config"], group_of_run(self.manifest)
        return verdicts(self.rows, eps=config["eps"], attacks=config["attack"], group=group)


def load_run(folder: Path) -> AttackedRun:
    """Read a finished attack run.

    Raises UserError when the folder holds no run, the run has not ended, is of another kind, or a file is damaged, or
    is not what the run wrote.
    """
    run = read_finished(folder, "summary.json", Summary, kind="attack", needed=_Needed, again="run the attack again")
    goal = (run.manifest["config"].get("goals") or [None])[0]
    rows = _rows(folder / "results.parquet", not_ended(folder, "attack"), goal)
    _require_labels(rows, run.manifest, folder)
    return AttackedRun(folder, run.manifest, run.summary, rows)


def _rows(path: Path, if_absent: str, goal: str | None) -> pa.Table:
    table = read_rows(path, required(SCHEMA, COLUMNS), if_absent=if_absent, again="run the attack again")
    # Runs from before there were goals have no such column.
    if goal is not None and _GOAL in table.column_names:
        table = table.filter(pc.field(_GOAL) == goal)
    return table.select(list(COLUMNS))


def _require_labels(rows: pa.Table, manifest: Manifest, folder: Path) -> None:
    """Refuse rows whose classes are not among those of the manifest."""
    classes = len(manifest["data"]["class_names"])
    for name in ("label", "clean_prediction"):
        highest = pc.max(rows.column(name)).as_py()
        if highest is not None and highest >= classes:
            raise UserError(
                f"the column '{name}' of '{folder / 'results.parquet'}' holds {highest}, and the manifest has "
                f"{classes} classes: run the attack again"
            )


# The findings of a run in plain words


def headline(summary: Summary) -> EpsSummary | None:
    """Return the largest eps, the one the verdict speaks of; None when no eps was run."""
    return summary.per_eps[-1] if summary.per_eps else None


def words_of(summary: Summary) -> GoalWords:
    """Return the words of the run's goal; where nothing names a class, no accuracy is spoken of."""
    words = goal_words(
        plain(summary.goal, 80), can_reject=summary.can_reject, min_cos=summary.min_cos, abstains=summary.abstains
    )
    return (
        words if summary.says_classes or words.clean != CLEAN else replace(words, clean="goal not reached when clean")
    )


def verdict(summary: Summary) -> str:
    """Return the outcome of a run in one plain sentence, with its interval."""
    at = headline(summary)
    if summary.unfinished:
        return unfinished(summary)
    if summary.images.evaluated == 0 or at is None:
        return "No image was evaluated, so nothing can be said."
    words, rate = words_of(summary), at.attack_success_rate
    if at.fooled + at.robust + at.undecided == 0:
        return words.nothing
    if rate.total == 0:
        return "The attacks broke on every image, so nothing is known about the model's robustness."
    start, worst = ball(summary.norm, at.eps_text), _worst_case(len(at.per_attack))
    if rate.successes == 0:
        whom = words.whom if words.whom != "images" else "images of this run"
        whose = (
            f"any of the {rate.total:,} {whom}" if rate.total > 1 else f"the only {whom.replace('images', 'image', 1)}"
        )
        return (
            f"No attack found {start[0].lower()}{start[1:]} to {words.effect} {whose}"
            f" ({worst}95% interval of the success rate {interval(rate)})."
        )
    return (
        f"{start} is enough to {words.effect} {percent(rate.value)} of the {words.whom}"
        f" ({rate.successes:,} of {rate.total:,}; {worst}95% interval {interval(rate)})."
    )


def _worst_case(attacks: int) -> str:
    return f"worst case over {attacks} attacks per image; " if attacks > 1 else ""


def cosines(at: EpsSummary, goal: str, *, unfinished: bool = False) -> str:
    """Say what became of the cosine that a feature goal is about, or has so far; "" for other goals."""
    if at.cosine is None:
        return ""
    what = "to the target" if goal.partition(":")[2] else "to the clean feature (FCS)"
    return (
        f"{'So far, mean' if unfinished else 'Mean'} cosine {what}: {number(at.cosine.clean)} unperturbed,"
        f" {number(at.cosine.attacked)} under attack at"
        f" {plain(at.eps_text, 20)} (95% intervals by Student's t over {count_of(at.cosine.attacked.total, 'images')})."
    )


def acceptances(at: EpsSummary, *, unfinished: bool = False, abstains: bool = False) -> str:
    """Say how many images a model that may refuse accepted and rejected, before and under attack; "" for others.

    Of one that abstains, how many it answered, and how many it gave no answer to.
    """
    if at.acceptance is None:
        return ""
    found = at.acceptance
    taken, other = ("answered", "without an answer") if abstains else ("accepted", "rejected")
    return (
        f"{f'So far {taken}' if unfinished else taken.capitalize()} and {other}: {found.clean_accepted:,} and"
        f" {count_of(found.clean_rejected, 'images')} unperturbed,"
        f" {found.accepted:,} and {found.rejected:,} under attack at {plain(at.eps_text, 20)}."
    )


def unfinished(summary: Summary) -> str:
    """Say that a run stopped early, why, and what is known all the same; "" of a run that came to its end."""
    if not summary.unfinished:
        return ""
    at, parts = headline(summary), [f"Stopped early: {plain(summary.unfinished)}."]
    if summary.images.uncounted:
        parts.append("Numbers are of the images classified so far, so no rate of the data is known.")
    elif at is not None and at.undecided:
        parts.append(
            f"{at.undecided:,} of {at.robust_accuracy.total:,} images are undecided, so {_held(summary)} at "
            f"{plain(at.eps_text, 20)} lies between {robust_bounds(at).replace(f' {RANGE} ', ' and ')}."
        )
    return " ".join([*parts, "The same command with a larger budget, or none, goes on from here."])


def _held(summary: Summary) -> str:
    """Name the share of images on which the goal is not reached, inside a sentence."""
    words = words_of(summary)
    return words.held if words.held.endswith("accuracy") else f'the share "{words.held}"'


def open_ended(summary: Summary, least: Rate, most: Rate | None) -> bool:
    """Whether a rate of a run that stopped early is only known between two bounds."""
    return bool(summary.unfinished) and most is not None and most.successes > least.successes


def robust_bounds(at: EpsSummary) -> str:
    """Return robust accuracy if no undecided image were robust, and if all of them were, as "a - b"."""
    return bounds(at.robust_accuracy, at.robust_accuracy_at_most)


def success_bounds(at: EpsSummary) -> str:
    """Return the success rate if no undecided image fell, and if all of them did, as "a - b"."""
    total = at.fooled + at.robust + at.undecided
    low, high = (count / total if total else None for count in (at.fooled, at.fooled + at.undecided))
    return f"{percent(low)} {RANGE} {percent(high)}"


def each_attack_on(words: GoalWords) -> str:
    """Say which images each attack of a run was made on."""
    return "the images that the ones before left standing" if words.leave else "all images"


def first_goal(summary: Summary) -> str:
    """Say which of several goals the counts by attack are of; "" where there is one."""
    return "for level 0, the classes" if summary.goal.rpartition("/")[2].endswith("matrix") else ""


def how_many_attacks(n: int) -> str:
    """Return "the attack", "both attacks" or "all n attacks"."""
    return {1: "the attack", 2: "both attacks"}.get(n, f"all {n} attacks")


def smaller_eps(summary: Summary) -> str:
    """Return what already happens at the smallest eps, or "" when there is only one."""
    if len(summary.per_eps) < 2 or summary.per_eps[0].attack_success_rate.total == 0:
        return ""
    at = summary.per_eps[0]
    if summary.unfinished and at.undecided:
        between = success_bounds(at).replace(f" {RANGE} ", " and ")
        return f"At {plain(at.eps_text)} the attack success rate lies between {between}."
    rate = at.attack_success_rate
    return f"At {plain(at.eps_text)} the attack success rate is {percent(rate.value)} (95% interval {interval(rate)})."

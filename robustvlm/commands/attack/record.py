"""A finished attack run read back from its folder, and runs compared on the images they share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from robustvlm.commands.attack.store import SCHEMA
from robustvlm.commands.attack.summary import Summary
from robustvlm.commands.attack.verdicts import Verdicts, verdicts
from robustvlm.errors import UserError
from robustvlm.report.words import norm_name, plain
from robustvlm.runs.manifest import Manifest, require_shape, require_unchanged
from robustvlm.runs.read import read_manifest_of, read_object, read_rows, required
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import PairedTest, Rate, holm, mcnemar_exact, rate

# A finished run read back from its folder, with one clear error for whatever is wrong with it

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
        """Return the worst case per image."""
        config = self.manifest["config"]
        return verdicts(self.rows, eps=config["eps"], attacks=config["attack"])


def load_run(folder: Path) -> AttackedRun:
    """Read a finished attack run.

    Raises UserError when the folder holds no run, the run has not ended, is of another kind, or a file is damaged, or
    is not what the run wrote.
    """
    manifest = read_manifest_of(folder)
    if manifest["kind"] != "attack":
        raise UserError(f"cannot report on '{folder}': expected a run of kind 'attack', got {manifest['kind']!r}")
    require_shape(_Needed, manifest, folder / "manifest.json", ": run the attack again")
    unfinished = f"the run '{folder}' has not ended: give its attack command again to go on, then report"
    path = folder / "summary.json"
    summary = _summary(path, read_object(path, unfinished))
    require_unchanged(folder, manifest, what="attack ")
    rows = _rows(folder / "results.parquet", unfinished, (manifest["config"].get("goals") or [None])[0])
    _require_labels(rows, manifest, folder)
    return AttackedRun(folder=folder, manifest=manifest, summary=summary, rows=rows)


def _summary(path: Path, content: dict[str, Any]) -> Summary:
    require_shape(Summary, content, path, ": not a run summary of this version, run the attack again")
    return Summary.model_validate(content)


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


# Runs against each other on the images they share: paired exact tests, corrected for how many were made

LEVEL = 0.05
CLEAN = "unperturbed"
CRITERION = f"paired test, p <= {LEVEL:g} after Holm's correction"
"""What makes a difference count as shown."""


@dataclass(frozen=True)
class Comparison:
    """Two runs (positions in the list given) on the same images under one `condition`.

    The rates count images answered right, unperturbed or after every attack; `adjusted` is Holm's p-value over all
    comparisons of the report.
    """

    first: int
    second: int
    condition: str
    first_rate: Rate
    second_rate: Rate
    test: PairedTest
    adjusted: float

    @property
    def finding(self) -> int | None:
        """Position of the run shown to be right more often; None when the difference may be chance."""
        if self.adjusted > LEVEL or self.test.only_first == self.test.only_second:
            return None
        return self.first if self.test.only_first > self.test.only_second else self.second

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the comparison as plain JSON values, runs by name."""
        return {
            "first": names[self.first],
            "second": names[self.second],
            "condition": self.condition,
            "first_rate": self.first_rate.model_dump(mode="json"),
            "second_rate": self.second_rate.model_dump(mode="json"),
            "test": self.test.model_dump(mode="json"),
            "p_value_holm": self.adjusted,
            "better": None if self.finding is None else names[self.finding],
        }


Answers = dict[tuple[str, str], bool]
"""Whether the model is right, by image id and true class."""


def compare(runs: Sequence[AttackedRun]) -> list[Comparison]:
    """Test every pair of runs, unperturbed and at each norm, eps and goal that both ran, on the images both decided.

    An image is the same when its id and the name of its class agree. Where a run stopped early and has undecided images
    there is no test: those that it has decided are the ones that fall easily. Source: McNemar's exact test, Holm's
    correction.
    """
    tested: list[tuple[int, int, str, PairedTest]] = []
    answers = [_answers(run) for run in runs]
    for (i, first), (j, second) in itertools.combinations(enumerate(answers), 2):
        for condition in [c for c in first if c in second]:
            shared = [image for image in first[condition] if image in second[condition]]
            if shared:
                test = mcnemar_exact(
                    [first[condition][image] for image in shared], [second[condition][image] for image in shared]
                )
                tested.append((i, j, _text(runs[i], condition), test))
    adjusted = holm([test.p_value for *_, test in tested])
    return [
        Comparison(
            first=i,
            second=j,
            condition=text,
            first_rate=rate(test.both + test.only_first, test.total),
            second_rate=rate(test.both + test.only_second, test.total),
            test=test,
            adjusted=p,
        )
        for (i, j, text, test), p in zip(tested, adjusted, strict=True)
    ]


Condition = tuple[str, float, str] | None


def _answers(run: AttackedRun) -> dict[Condition, Answers]:
    """Return who was right, unperturbed (key None) and per norm, eps and goal; undecided images are left out.

    Of a run that stopped early, only what it has decided of all its images.
    """
    table, early = run.verdicts(), bool(run.summary.unfinished)
    names = dict(enumerate(run.class_names)) | {-1: "an unknown class"}
    result: dict[Condition, Answers] = {
        None: {(image.image_id, names[image.label]): image.clean_correct for image in table.images}
    }
    for i, eps in enumerate(table.eps):
        outcomes = [(image, table.after(image, i)) for image in table.images]
        if early and (run.summary.images.waiting or any(outcome == "undecided" for _, outcome in outcomes)):
            continue
        result[run.summary.norm, eps, run.goal] = {
            (image.image_id, names[image.label]): outcome == "robust"
            for image, outcome in outcomes
            if outcome != "undecided"
        }
    return result


def _text(run: AttackedRun, condition: Condition) -> str:
    if condition is None:
        return CLEAN
    norm, eps, goal = condition
    about = "" if goal == "misclassify" else f", {plain(goal, 60)}"
    return f"{norm_name(norm)} {plain(run.eps_texts[eps], 20)}{about}"


def findings(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[str]:
    """Say in one sentence per pair of runs where one was shown to be better, by which criterion, and where neither was.

    Example:
        >>> test = mcnemar_exact([True] * 9, [False] * 9)
        >>> shown = Comparison(0, 1, "L2 0.5", rate(9, 9), rate(0, 9), test, adjusted=0.004)
        >>> findings([shown], ["A", "B"])
        ["A is right more often than B at L2 0.5 (paired test, p <= 0.05 after Holm's correction)."]
    """
    sentences = []
    pairs = dict.fromkeys((c.first, c.second) for c in comparisons)
    for first, second in pairs:
        mine = [c for c in comparisons if (c.first, c.second) == (first, second)]
        # Conditions name their goal where it is not to be right.
        does = "does better" if any("," in c.condition for c in mine) else "is right more often"
        parts = []
        for better, worse in ((first, second), (second, first)):
            where = _places([c.condition for c in mine if c.finding == better])
            if where:
                parts.append(f"{names[better]} {does} than {names[worse]} {where}")
        if parts:
            parts[-1] += f" ({CRITERION})"
        nothing = _places([c.condition for c in mine if c.finding is None])
        if nothing:
            # Names keep their spelling: only our own words begin with a capital.
            parts.append(
                f"{'no' if parts else 'No'} difference between {names[first]} and {names[second]} is shown {nothing}"
                f"{'' if parts else f' ({CRITERION})'}"
            )
        sentences.append("; ".join(parts) + ".")
    return sentences


def stopped(runs: Sequence[AttackedRun], names: Sequence[str]) -> list[str]:
    """Say which runs stopped early, and what of them is not compared."""
    return [
        f"{name} stopped early ({plain(run.summary.unfinished)}): where it has undecided images it is not tested."
        for run, name in zip(runs, names, strict=True)
        if run.summary.unfinished
    ]


def _places(conditions: Sequence[str]) -> str:
    """Join conditions as in "unperturbed, at L2 0.5 and at L2 1"."""
    places = [c if c == CLEAN else f"at {c}" for c in conditions]
    return " and ".join([", ".join(places[:-1]), places[-1]] if len(places) > 1 else places)

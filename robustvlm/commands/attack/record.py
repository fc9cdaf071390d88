"""A finished attack run read back from its folder, with one clear error for whatever is wrong with it."""

from __future__ import annotations

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
from robustvlm.runs.manifest import Manifest, require_shape, require_unchanged
from robustvlm.runs.read import read_manifest_of, read_object, read_rows, required
from robustvlm.runs.run import FinishedRun

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

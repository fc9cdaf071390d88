"""A finished run read back from its folder, with one clear error for whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from robustvlm.errors import UserError, nearest
from robustvlm.runs.summary import Summary
from robustvlm.runs.verdicts import Verdicts, verdicts

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

_NEEDED = {"config": ("model", "data", "norm", "eps", "eps_text", "attack"), "data": ("class_names",)}


@dataclass(frozen=True)
class RunRecord:
    """Manifest, summary and rows of one finished attack run; of several goals, the rows of the first."""

    folder: Path
    manifest: dict[str, Any]
    summary: Summary
    rows: pa.Table

    @property
    def name(self) -> str:
        """The run's name: the one in its manifest, else that of its folder."""
        return str(self.manifest.get("name") or self.folder.resolve().name)

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


def find_run(name: str | Path, *, root: Path = Path("runs")) -> Path:
    """Return the folder of a run given by path, or by its name under `root`; UserError when there is none."""
    for folder in (Path(name), root / name):
        if folder.is_dir():
            return folder
    known = [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    none = f"there are no runs under '{root}/': make one with `robustvlm attack` or `robustvlm certify`"
    hint = nearest(str(name), known) if known else none
    raise UserError(f"no run '{name}': expected a run folder or the name of one under '{root}/'; {hint}")


def load_run(folder: Path) -> RunRecord:
    """Read a finished attack run.

    Raises UserError when the folder holds no run, the run has not ended, is of another kind, or a file is damaged.
    """
    manifest = _read_json(folder / "manifest.json", f"'{folder}' is no run folder: expected a manifest.json in it")
    if manifest.get("kind") != "attack":
        raise UserError(f"cannot report on '{folder}': expected a run of kind 'attack', got {manifest.get('kind')!r}")
    for part, keys in _NEEDED.items():
        missing = [key for key in keys if key not in (manifest.get(part) or {})]
        if missing:
            raise UserError(f"'{folder / 'manifest.json'}' lacks {part}.{missing[0]}: run the attack again")
    unfinished = f"the run '{folder}' has not ended: give its attack command again to go on, then report"
    return RunRecord(
        folder=folder,
        manifest=manifest,
        summary=_summary(folder / "summary.json", _read_json(folder / "summary.json", unfinished)),
        rows=_rows(folder / "results.parquet", unfinished, (manifest["config"].get("goals") or [None])[0]),
    )


def _read_json(path: Path, if_absent: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(if_absent) from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"cannot read '{path}': expected a JSON object, got {type(content).__name__}")
    return content


def _summary(path: Path, content: dict[str, Any]) -> Summary:
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"'{path}' is not a run summary of this version: {where}: {problem['msg']}") from error


def _rows(path: Path, if_absent: str, goal: str | None) -> pa.Table:
    try:
        present = set(pq.read_schema(path).names)
        missing = [column for column in COLUMNS if column not in present]
        if missing:
            raise UserError(f"'{path}' lacks the column '{missing[0]}': run the attack again")
        # Runs from before there were goals have no such column.
        chosen = [(_GOAL, "=", goal)] if goal is not None and _GOAL in present else None
        return pq.read_table(path, columns=list(COLUMNS), filters=chosen)
    except FileNotFoundError as error:
        raise UserError(if_absent) from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}': {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""A finished detect run read back from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from robustvlm.errors import UserError
from robustvlm.report.record import _first_line, _read_json
from robustvlm.runs.detect_config import DetectConfig
from robustvlm.runs.detect_summary import OWN, DetectSummary, ScoreSummary

_COLUMNS = ("set", "image_id", "label", "prediction")


@dataclass(frozen=True)
class DetectRecord:
    """Manifest, settings, summary and rows of one finished detect run."""

    folder: Path
    manifest: dict[str, Any]
    config: DetectConfig
    summary: DetectSummary
    rows: pa.Table

    @property
    def name(self) -> str:
        """The run's name: the one in its manifest, else that of its folder."""
        return str(self.manifest.get("name") or self.folder.resolve().name)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, indexed by label."""
        return list((self.manifest.get("data") or {}).get("class_names") or [])

    @property
    def shown(self) -> ScoreSummary:
        """The score that pictures and histograms are about: the model's own, or the best."""
        by_name = {score.name: score for score in self.summary.scores}
        return by_name.get(OWN, by_name[self.summary.best])

    def scores(self, name: str, set_name: str) -> NDArray[np.float64]:
        """Return a score of every image of a set."""
        chosen = np.array(self.rows.column("set").to_pylist()) == set_name
        return np.asarray(self.rows.column(name).to_numpy(), dtype=np.float64)[chosen]


def is_detect_run(folder: Path) -> bool:
    """Whether the folder's manifest says that it is a detect run; False where none can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == "detect"


def load_detect_run(folder: Path) -> DetectRecord:
    """Read a finished detect run; UserError when it has not ended, is of another kind, or a file is damaged."""
    manifest = _read_json(folder / "manifest.json", f"'{folder}' is no run folder: expected a manifest.json in it")
    if manifest.get("kind") != "detect":
        raise UserError(f"'{folder}' is no detect run: expected a run of kind 'detect', got {manifest.get('kind')!r}")
    unfinished = f"the run '{folder}' has not ended: give its detect command again to go on"
    try:
        config = DetectConfig.model_validate(manifest.get("config"))
        summary = DetectSummary.model_validate(_read_json(folder / "summary.json", unfinished))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"'{folder}' is not a detect run of this version: {where}: {problem['msg']}") from error
    return DetectRecord(folder, manifest, config, summary, _rows(folder / "results.parquet", unfinished, summary))


def _rows(path: Path, if_absent: str, summary: DetectSummary) -> pa.Table:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise UserError(if_absent) from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read '{path}': {_first_line(error)}") from error
    missing = [
        name for name in (*_COLUMNS, *(score.name for score in summary.scores)) if name not in table.column_names
    ]
    if missing:
        raise UserError(f"'{path}' lacks the column '{missing[0]}': run the detection again")
    return table

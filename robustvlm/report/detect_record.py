"""A finished detect run read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from robustvlm.errors import UserError
from robustvlm.runs.checksums import require_unchanged
from robustvlm.runs.detect_config import DetectConfig
from robustvlm.runs.detect_summary import OWN, DetectSummary, ScoreSummary
from robustvlm.runs.manifest import kind_of_run, require_shape
from robustvlm.runs.read import read_manifest_of, read_object
from robustvlm.runs.results import read_rows
from robustvlm.runs.run import FinishedRun

_COLUMNS = (("set", pa.string()), ("image_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()))


@dataclass(frozen=True)
class DetectRecord(FinishedRun[DetectSummary]):
    """Manifest, settings, summary and rows of one finished detect run."""

    config: DetectConfig
    rows: pa.Table

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
    return kind_of_run(folder) == "detect"


def load_detect_run(folder: Path) -> DetectRecord:
    """Read a finished detect run; UserError when it has not ended, is of another kind, or a file is damaged."""
    manifest = read_manifest_of(folder)
    if manifest["kind"] != "detect":
        raise UserError(f"'{folder}' is no detect run: expected a run of kind 'detect', got {manifest['kind']!r}")
    unfinished = f"the run '{folder}' has not ended: give its detect command again to go on"
    again = "run the detection again"
    path = folder / "summary.json"
    require_shape(
        DetectConfig, manifest["config"], folder / "manifest.json", f": not a detect run of this version, {again}"
    )
    content = read_object(path, unfinished)
    require_shape(DetectSummary, content, path, f": not a detect run of this version, {again}")
    config, summary = DetectConfig.model_validate(manifest["config"]), DetectSummary.model_validate(content)
    require_unchanged(folder, manifest, what="detect ")
    wanted = [*_COLUMNS, *((score.name, pa.float64()) for score in summary.scores)]
    fields = pa.schema([pa.field(name, kind, nullable=False) for name, kind in wanted])
    rows = read_rows(folder / "results.parquet", fields, if_absent=unfinished, again=again)
    return DetectRecord(folder, manifest, summary, config, rows)

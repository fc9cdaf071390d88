"""A finished certify run read back from its folder, with the curves that its report draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from robustvlm.certify.claims import RADII
from robustvlm.errors import UserError
from robustvlm.report.certify_plots import Line
from robustvlm.runs.certify_config import CertifyConfig
from robustvlm.runs.certify_rows import CERTIFY_SCHEMA
from robustvlm.runs.certify_summary import CertifySummary
from robustvlm.runs.checksums import require_unchanged
from robustvlm.runs.manifest import kind_of_run, require_shape
from robustvlm.runs.read import read_manifest_of, read_object
from robustvlm.runs.results import read_rows
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import rate

_DRAWN = ("radius", "paper_radius", "fcsb_radius", "cone_radius", "direction_radius", "deployed_radius", "mean_radius")
_CURVES = {"ours": "this certificate", "paper": "paper's bound", "fcsb": "corrected FCSB", "cone": "cone (T3)",
           "deployed": "deployed mean"}  # fmt: skip
_POINTS = 121
_ALWAYS = ("index", "image_id", "label", "prediction", "claim", "radius", "n", "n_pilot", "certificate")
_WANTED = pa.schema([field.with_nullable(field.name not in _ALWAYS) for field in CERTIFY_SCHEMA])


@dataclass(frozen=True)
class CertifyRecord(FinishedRun[CertifySummary]):
    """Manifest, settings, summary and rows of one finished certify run."""

    config: CertifyConfig
    rows: pa.Table

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, indexed by label."""
        return list((self.manifest.get("data") or {}).get("class_names") or [])

    def radii(self, method: str) -> NDArray[np.float64] | None:
        """Return a method's radii, one per image; None when the run has none."""
        column = self.rows.column(method) if method in self.rows.column_names else None
        if column is None or column.null_count == len(column):
            return None
        return np.nan_to_num(column.to_numpy(zero_copy_only=False).astype(np.float64))

    @property
    def copies(self) -> NDArray[np.int64]:
        """Noisy copies used, per image."""
        used = self.rows.column("n").to_numpy() + self.rows.column("n_pilot").to_numpy()
        return np.asarray(used, dtype=np.int64)


def is_certify_run(folder: Path) -> bool:
    """Whether the folder's manifest says that it is a certify run; False where none can be read."""
    return kind_of_run(folder) == "certify"


def load_certify_run(folder: Path) -> CertifyRecord:
    """Read a finished certify run; UserError when it has not ended, is of another kind, or a file is damaged."""
    manifest = read_manifest_of(folder)
    if manifest["kind"] != "certify":
        raise UserError(f"'{folder}' is no certify run: expected a run of kind 'certify', got {manifest['kind']!r}")
    unfinished = f"the run '{folder}' has not ended: give its certify command again to go on"
    again = "run the certification again"
    path = folder / "summary.json"
    require_shape(
        CertifyConfig, manifest["config"], folder / "manifest.json", f": not a certify run of this version, {again}"
    )
    content = read_object(path, unfinished)
    require_shape(CertifySummary, content, path, f": not a certify run of this version, {again}")
    require_unchanged(folder, manifest, what="certify ")
    rows = read_rows(folder / "results.parquet", _WANTED, if_absent=unfinished, again=again)
    return CertifyRecord(
        folder=folder,
        manifest=manifest,
        config=CertifyConfig.model_validate(manifest["config"]),
        summary=CertifySummary.model_validate(content),
        rows=rows,
    )


def cosine_lines(run: CertifyRecord) -> list[Line]:
    """Return the mean certified cosines over distance, of a feature run."""
    curve = run.summary.curve
    lines = []
    for field, name in _CURVES.items():
        values = [getattr(point, field) for point in curve]
        if values and None not in values:
            lines.append(Line(name=name, eps=tuple(point.eps for point in curve), values=tuple(values)))
    return lines


def share_lines(run: CertifyRecord) -> list[Line]:
    """Return, per method, the share of images certified at each distance.

    For claims about classes only images whose class is right count: certified accuracy, over images of known class.
    """
    right = run.rows.column("correct").to_numpy(zero_copy_only=False)
    about_class = run.summary.facts.about_class
    known = np.array([value is not None for value in right]) if about_class else np.ones(len(right), dtype=bool)
    counted = np.array([bool(value) for value in right]) if about_class else known
    found = [(name, radii) for name in _DRAWN if (radii := run.radii(name)) is not None]
    top = max((float(radii.max(initial=0.0)) for _, radii in found), default=0.0)
    grid = np.linspace(0.0, 1.02 * top or 1.0, _POINTS)
    lines = []
    for name, radii in found:
        # At distance zero an abstention certifies nothing either.
        counts = [int((counted & (radii >= eps) & (radii > 0.0)).sum()) for eps in grid]
        rates = tuple(rate(count, int(known.sum())) for count in counts)
        lines.append(Line(name=RADII[name].page, eps=tuple(grid), rates=rates))
    return lines

"""The HTML report of an immunize run: one file that needs no network and no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from robustvlm.errors import UserError
from robustvlm.report import immunize_wording as words
from robustvlm.report import tables, training_plots
from robustvlm.report.html import _environment, _write, drawing
from robustvlm.report.record import read_json_of, read_manifest_of
from robustvlm.report.wording import plain
from robustvlm.runs.checksums import require_unchanged
from robustvlm.runs.immunize_config import RECORD, ImmunizeConfig
from robustvlm.runs.manifest import kind_of_run, require_shape
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import Rate

# More would be a file, not a report; all of them are in the record.
_ROWS = 400


class ImmunizeRun(FinishedRun[dict[str, Any]]):
    """Manifest and record of a finished immunize run."""

    @property
    def record(self) -> dict[str, Any]:
        """The summary under the name that its file has."""
        return self.summary


def is_immunize_run(folder: Path) -> bool:
    """Whether the folder's manifest says that it is an immunised model; False where none can be read."""
    return kind_of_run(folder) == "immunize"


def load_immunize_run(folder: Path) -> ImmunizeRun:
    """Read a finished immunize run; UserError when it has not ended or a file is damaged."""
    manifest = read_manifest_of(folder)
    require_shape(
        ImmunizeConfig,
        manifest["config"],
        folder / "manifest.json",
        ": its config is not of this version; run it again",
    )
    record = read_json_of(folder / RECORD, f"the run '{folder}' has not ended: give its command again")
    require_unchanged(folder, manifest, what="immunize ")
    return ImmunizeRun(folder, manifest, record)


def write_immunize_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished run, by default to `report.html` in its folder, and return its path."""
    path = out or folder / "report.html"
    with drawing(folder):
        page = render_immunize_run(load_immunize_run(folder))
    _write(path, page)
    return path


def render_immunize_run(run: ImmunizeRun) -> str:
    """Return the report of one run as HTML.

    Raises:
        UserError: the record is not one of this program's.
    """
    record = run.record
    try:
        return (
            _environment()
            .get_template("immunize.html.j2")
            .render(
                run=run,
                config=run.manifest["config"],
                record=record,
                verdict=words.verdict(record),
                tone=words.tone(record),
                cards=_cards(record["measures"]),
                curve=_curve(record.get("vaccine")),
                unknown=_unknown(record["measures"]),
                diagnostics=_diagnostics(record),
                classes=record["classes"][:_ROWS],
                kept=record["antibodies"]["kept"][:_ROWS],
                dropped=record["antibodies"]["dropped"][:_ROWS],
                added=record.get("added"),
                manifest=tables.manifest_rows(run.manifest),
            )
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{run.folder / RECORD}' is no record of `robustvlm immunize` ({error})") from None


def _cards(measures: dict[str, Any]) -> list[tuple[str, Rate, bool]]:
    named = (
        ("Accuracy before (zero-shot)", "accuracy_before", True),
        ("Accuracy after", "accuracy_after", True),
        ("Right and accepted", "accepted_right", True),
        ("Known images wrongly refused", "rejected", False),
    )
    cards = [(what, Rate(**measures[key]), good) for what, key, good in named if key in measures]
    unknown = measures.get("unknown", {})
    rejected = [(f"Unknown images rejected, {plain(spec, 40)}", found, True) for spec, found in unknown.items()]
    return cards + [(what, words.rejected_of(found), good) for what, found, good in rejected]


def _unknown(measures: dict[str, Any]) -> list[tuple[str, int, str, str, Rate]]:
    """Return per set its images, AUROC before and after, and the share rejected."""
    rows = []
    for spec, found in measures.get("unknown", {}).items():
        before, after = (_auroc(found[key]) for key in ("auroc_mcm", "auroc"))
        rows.append((spec, found["images"], before, after, words.rejected_of(found)))
    return rows


def _auroc(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _curve(vaccine: dict[str, Any] | None) -> Markup | None:
    if vaccine is None or len(vaccine["history"]) < 2:
        return None
    names = {"pull (held out)": "pull", "push (held out)": "push", "held out, both": "held_out"}
    points = {name: [(look["step"], look[key]) for look in vaccine["history"]] for name, key in names.items()}
    return training_plots.loss_curves(points, key="vaccine")


def _diagnostics(record: dict[str, Any]) -> list[tuple[str, str]]:
    found, vaccine, band = record["diagnostics"], record.get("vaccine"), record["antibodies"]["band"]
    margins = f"{found['margin_min']:.3f} at least, median {found['margin_median']:.3f}"
    rows = [
        ("Largest angle from prototype to text (xi)", f"{record['xi_degrees']:.1f}°"),
        ("Weight of the antibodies in the score (lambda_inf)", f"{record['weight']:g}"),
        ("Margin 1 - cos from prototypes to antibodies", margins),
    ]
    if band is not None:
        rows.append(("Band of antibodies (cosine to their class)", f"{band['safe']:.3f} to {band['risk']:.3f}"))
    for key, what in (("crossed", "Antibodies near the other four fifths"), ("near", "Named near things covered")):
        if found.get(f"coverage_{key}") is not None:
            rows.append((f"{what} (within {found['angle']:.0f}°)", f"{found[f'coverage_{key}']:.1%}"))
    if found.get("eps_align_degrees") is not None:
        rows.append(("Prototypes from the held-out means of their classes", f"{found['eps_align_degrees']:.1f}°"))
    if vaccine is not None:
        rows += [
            ("Vaccine: step kept", str(vaccine["chosen_step"])),
            ("Vaccine: margin, and pairs that it pushes", f"{vaccine['margin']:.3f}, {vaccine['pushed_share']:.1%}"),
            ("Vaccine: how far features are moved (median)", f"{vaccine['median_move_degrees']:.1f}°"),
        ]
    return rows

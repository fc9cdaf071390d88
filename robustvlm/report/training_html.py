"""The HTML report of a training run: one file that needs no network and no script."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from robustvlm.report import tables, training_plots
from robustvlm.report.html import _environment, _write, drawing
from robustvlm.report.record import read_manifest_of
from robustvlm.report.wording import DASH, duration, interval, percent, plain
from robustvlm.runs.checksums import require_unchanged
from robustvlm.runs.manifest import kind_of_run, require_shape
from robustvlm.runs.run import FinishedRun
from robustvlm.runs.training_summary import TrainingSummary, read_training
from robustvlm.stats import Mean, Rate
from robustvlm.training.history import History, Validation

KINDS = ("finetune", "purify")
_FIRST = ("clean accuracy", "robust accuracy")
_LEVEL = re.compile(r"(.+), level (\d+)")


class TrainingRun(FinishedRun[TrainingSummary]):
    """Manifest and record of a finished training run."""


def is_training_run(folder: Path) -> bool:
    """Whether the folder's manifest says that something was trained; False where none can be read."""
    return kind_of_run(folder) in KINDS


def load_training_run(folder: Path) -> TrainingRun:
    """Read a finished training run; UserError when it has not ended or a file is damaged."""
    manifest = read_manifest_of(folder)
    require_shape(_Needed, manifest, folder / "manifest.json", ": give the run's command again with --fresh")
    summary = read_training(folder)
    require_unchanged(folder, manifest)
    return TrainingRun(folder, manifest, summary)


class _Config(BaseModel):
    """The settings that a report reads."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    data: str
    norm: str = ""
    eps_text: str = ""
    inner_steps: int = 0


class _Needed(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    config: _Config


def write_training_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished training run, by default to `report.html` in its folder, and return its path."""
    path = out or folder / "report.html"
    with drawing(folder):
        page = render_training_run(load_training_run(folder))
    _write(path, page)
    return path


def render_training_run(run: TrainingRun) -> str:
    """Return the report of one training run as HTML."""
    history = run.summary.history
    return (
        _environment()
        .get_template("training.html.j2")
        .render(
            run=run,
            config=run.manifest["config"],
            summary=run.summary,
            sentence=verdict(run.summary),
            cards=_cards(history),
            charts=_charts(history),
            measures=measure_rows(history),
            warnings=history.warnings,
            settings=tables.manifest_rows({"method": run.summary.settings}) if run.summary.settings else [],
            skipped=sorted(history.skipped.items()),
            cost=cost_rows(run.summary),
            manifest=tables.manifest_rows(run.manifest),
        )
    )


def verdict(summary: TrainingSummary) -> str:
    """Say in one sentence what training did to the measure that chose the weights, or how long it went on."""
    history, by = summary.history, summary.best_by
    kept, first = history.best(), history.validations[0] if history.validations else None
    if by is None or kept is None or first is None or kept.number(by) is None:
        return f"Trained for {summary.steps:,} steps; the weights of the last one were kept."
    change = f"{by.capitalize()} went from {_shown(first, by)} to {_shown(kept, by)}"
    if by != "clean accuracy" and kept.number("clean accuracy") is not None:
        change += f", clean accuracy from {_shown(first, 'clean accuracy')} to {_shown(kept, 'clean accuracy')}"
    return (
        f"{change}, on the validation images, which chose the weights (those of step {kept.step:,} of "
        f"{summary.steps:,}): too high for a claim, measure on other images."
    )


def measure_rows(history: History) -> list[tuple[str, str, str]]:
    """Return, for every measure, its name, and its value before training and of the kept weights."""
    kept = history.best()
    if kept is None:
        return []
    first = history.validations[0]
    names = sorted(kept.measures, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    return [(name, _shown(first, name), _shown(kept, name)) for name in names]


def cost_rows(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return the cost of a training as rows of label and value."""
    history = summary.history
    share = summary.trained_parameters / max(1, summary.parameters)
    rows = [
        ("Steps", f"{summary.steps:,}, {history.seconds / max(1, summary.steps):.3g} s each"),
        ("Images", f"{history.images:,}, {history.images_per_second:,.1f} a second"),
        ("Encoder passes", f"{history.passes:,} (forward and backward)"),
        ("Training", duration(history.seconds)),
        ("Validation", duration(history.validation_seconds)),
        ("Peak memory", f"{history.peak_memory / 2**20:,.0f} MiB"),
        ("Trained", f"{summary.trained_parameters:,} of {summary.parameters:,} parameters ({percent(share)})"),
        ("Processes", f"{summary.ranks}"),
    ]
    if history.estimate is not None:
        said = history.estimate
        rows.append(("Said before", f"{said.passes:,} passes, {duration(said.seconds)}"))
    return rows


def _cards(history: History) -> list[tuple[str, Rate]]:
    kept = history.best()
    measures = {} if kept is None else kept.measures
    found = ((name, measures.get(name)) for name in (*_FIRST, "noise accuracy"))
    return [(name, rate) for name, rate in found if isinstance(rate, Rate)]


def _charts(history: History) -> dict[str, Markup]:
    charts: dict[str, Markup] = {}
    terms: dict[str, list[tuple[int, float]]] = {}
    for entry in history.steps:
        for name, value in entry.terms.items():
            terms.setdefault(plain(name, 40), []).append((entry.step, value))
    if terms:
        charts["loss"] = training_plots.loss_curves(terms, key="loss")
    rates: dict[str, list[tuple[int, Rate]]] = {}
    for found in history.validations:
        for name, measure in found.measures.items():
            if isinstance(measure, Rate):
                rates.setdefault(plain(name, 40), []).append((found.step, measure))
    if rates:
        first = [name for name in _FIRST if name in rates]
        order = [*first, *(name for name in rates if name not in first)]
        charts["validation"] = training_plots.rate_curves(
            {name: rates[name] for name in order}, key="validation", kept=history.best_step
        )
    means: dict[str, list[tuple[int, Mean]]] = {}
    for found in history.validations:
        for name, measure in found.measures.items():
            if isinstance(measure, Mean) and measure.value is not None:
                means.setdefault(plain(name, 40), []).append((found.step, measure))
    if means:
        charts["means"] = training_plots.mean_curves(means, key="means")
    kept = history.best()
    if kept is not None and by_level(kept):
        charts["norms"] = training_plots.level_norms(by_level(history.validations[0]), by_level(kept), key="norms")
    return charts


def by_level(found: Validation) -> dict[int, float]:
    """Return the measures that are given by level of a tree ("text norm, level 1"), the level first.

    Example:
        >>> by_level(Validation(step=0, measures={"text norm, level 0": 0.7, "text norm, level 1": 0.5, "x": 1.0}))
        {0: 0.7, 1: 0.5}
    """
    matches = ((_LEVEL.fullmatch(name), found.number(name)) for name in found.measures)
    return {int(match[2]): value for match, value in matches if match is not None and value is not None}


def _shown(found: Validation, name: str) -> str:
    measure = found.measures.get(name)
    if measure is None:
        return DASH
    if isinstance(measure, Rate):
        return f"{percent(measure.value)} ({interval(measure)})"
    if isinstance(measure, Mean):
        return DASH if measure.value is None else f"{measure.value:.4g}"
    return f"{measure:.4g}"

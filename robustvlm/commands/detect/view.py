"""A finished detect run read back from its folder, its charts, and its HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from robustvlm.commands.detect import terminal as words
from robustvlm.commands.detect.config import OWN, DetectConfig
from robustvlm.commands.detect.summary import DetectSummary, ScoreSummary
from robustvlm.core.files import require_regular
from robustvlm.detect import BASELINES
from robustvlm.detect.metrics import roc_points
from robustvlm.errors import UserError
from robustvlm.report import tables
from robustvlm.report.charts import DASHES, INK, MUTED, SERIES, STYLE, as_svg, chart, legend, new_figure
from robustvlm.report.page import data_uri, drawing, page, write_page
from robustvlm.report.words import duration, plain
from robustvlm.runs.manifest import kind_of_run, require_shape, require_unchanged
from robustvlm.runs.read import read_manifest_of, read_object, read_rows
from robustvlm.runs.run import FinishedRun

# A finished detect run read back from its folder

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


# Charts of detection: AUROC of every score, ROC curves, and how the scores of known and unknown images lie

Array = NDArray[np.float64]
_MARKERS = "osD^v"
# Points of a drawn ROC curve at most: a page does not get better by more.
_POINTS = 400


@dataclass(frozen=True, eq=False)
class Curve:
    """One score on one set: its name and the scores of known and unknown images."""

    name: str
    known: Array
    unknown: Array


@chart
def auroc_chart(scores: Sequence[ScoreSummary], sets: Sequence[str], *, key: str) -> Markup:
    """Draw the AUROC of every score with its interval, a colour and marker per set of unknown images."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure((6.4, 0.9 + 0.31 * len(scores)))
        rows = np.arange(len(scores))[::-1]
        for i, name in enumerate(sets):
            at = [next(on for on in score.on if on.unknown == name).auroc for score in scores]
            values = np.array([value.value for value in at])
            reach = np.abs(np.array([[value.low for value in at], [value.high for value in at]]) - values)
            shift = 0.18 * (len(sets) - 1) / 2 - 0.18 * i
            axes.errorbar(
                values, rows + shift, xerr=reach, fmt=_MARKERS[i % len(_MARKERS)], ms=4.5, lw=1.2,
                color=SERIES[i % len(SERIES)], label=name,
            )  # fmt: skip
        axes.set_yticks(rows, [score.title for score in scores])
        axes.set_ylim(-0.6, len(scores) - 0.4)
        low = min(on.auroc.low for score in scores for on in score.on)
        axes.set_xlim(min(0.45, low - 0.02), 1.005)
        axes.axvline(0.5, color=MUTED, lw=0.8, ls=":")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("AUROC, 95% interval (0.5: no better than chance)")
        legend(figure, columns=3)
        best = max(scores, key=lambda score: sum(on.auroc.value for on in score.on))
        reached = ", ".join(f"{on.unknown} {on.auroc.value:.3f}" for on in best.on)
        return as_svg(figure, key=key, alt=f"AUROC of every score. Highest mean: {best.title}, {reached}.")


@chart
def roc_chart(curves: Sequence[Curve], *, key: str, unknown: str) -> Markup:
    """Draw ROC curves of some scores on one set, with the line at 95% of the known images."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        for i, curve in enumerate(curves):
            false, true = _thinned(*roc_points(curve.known, curve.unknown))
            axes.plot(false, true, color=SERIES[i % len(SERIES)], ls=DASHES[i % len(DASHES)], lw=1.6, label=curve.name)
        axes.axhline(0.95, color=INK, lw=0.8, ls=":")
        axes.plot([0, 1], [0, 1], color=MUTED, lw=0.8, ls=":")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xlabel(f"unknown images accepted ({unknown})")
        axes.set_ylabel("known images accepted")
        legend(figure, columns=3)
        return as_svg(figure, key=key, alt=f"ROC curves on {unknown}: {', '.join(curve.name for curve in curves)}.")


@chart
def histogram(known: Array, unknown: Sequence[tuple[str, Array]], threshold: float, *, key: str, title: str) -> Markup:
    """Draw the distribution of a score over known and unknown images, as shares, with the threshold."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure()
        every = np.concatenate([known, *(values for _, values in unknown)])
        # A few far outliers, as distances have, must not press all the rest into one bar.
        low, high = np.percentile(every, [0.5, 99.5])
        bins = np.linspace(low, high if high > low else low + 1.0, 31)
        for i, (name, values) in enumerate([("known", known), *unknown]):
            shares = np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0] / len(values)
            axes.stairs(100 * shares, bins, color=SERIES[i % len(SERIES)], lw=1.6, label=name, fill=False)
            axes.stairs(100 * shares, bins, color=SERIES[i % len(SERIES)], alpha=0.15, fill=True)
        if bins[0] <= threshold <= bins[-1]:
            axes.axvline(threshold, color=INK, lw=1, ls="--")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"{title} (accepted right of the line)")
        axes.set_ylabel("% of images")
        legend(figure, columns=3)
        medians = ", ".join(f"{name} {np.median(values):.3g}" for name, values in [("known", known), *unknown])
        return as_svg(figure, key=key, alt=f"Distribution of {title}; medians: {medians}; threshold {threshold:.3g}.")


def _thinned(false: Array, true: Array) -> tuple[Array, Array]:
    if len(false) <= _POINTS:
        return false, true
    keep = np.unique(np.linspace(0, len(false) - 1, _POINTS).round().astype(int))
    return false[keep], true[keep]


# The HTML report of a detect run: one file that needs no network and no script

# Lines in a chart of ROC curves: more cannot be told apart.
_CURVES = 5


def write_detect_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished detect run, by default to `report.html` in its folder, and return its path.

    Raises UserError for a folder that holds no finished detect run.
    """
    path = out or folder / "report.html"
    with drawing(folder):
        text = render_detect_run(load_detect_run(folder))
    write_page(path, text)
    return path


def render_detect_run(run: DetectRecord) -> str:
    """Return the report of one detect run as HTML."""
    summary = run.summary
    titles = {score.name: score.title for score in summary.scores}
    return page(
        "detect.html.j2",
        run=run,
        config=run.config,
        summary=summary,
        words=words,
        titles=titles,
        oracles=words.oracle_titles(summary),
        shown=run.shown,
        auroc=auroc_chart(summary.scores, [part.name for part in summary.unknown], key="auroc"),
        rocs=[_roc(run, part.name, key=f"roc{i}") for i, part in enumerate(summary.unknown)],
        histograms=_histograms(run),
        mistakes=load_mistakes(run),
        findings=tables.findings(summary.checks),
        cost=_cost(run),
        manifest=tables.manifest_rows(run.manifest),
    )


def _roc(run: DetectRecord, unknown: str, *, key: str) -> Markup:
    """Draw the curves of the model's own score, the best ones on this set, and the best baseline."""
    by_auroc = sorted(run.summary.scores, key=lambda score: -_auroc(score, unknown))
    baseline = next((score for score in by_auroc if score.name in BASELINES), None)
    first = [score for score in by_auroc if score.name == OWN] + by_auroc[: _CURVES - 1]
    chosen = {score.name: score for score in [*first, *([baseline] if baseline else [])]}
    curves = [
        Curve(score.title, run.scores(name, "known"), run.scores(name, unknown)) for name, score in chosen.items()
    ]
    return roc_chart(curves, key=key, unknown=plain(unknown, 40))


def _auroc(score: ScoreSummary, unknown: str) -> float:
    return next(on.auroc.value for on in score.on if on.unknown == unknown)


def _histograms(run: DetectRecord) -> list[Markup]:
    """Draw the score that the report shows, and the best baseline beside it where that is another."""
    scores = {score.name: score for score in run.summary.scores}
    baselines = [scores[name] for name in BASELINES if name in scores]
    best = max(baselines, key=lambda score: sum(on.auroc.value for on in score.on), default=None)
    chosen = {score.name: score for score in (run.shown, best) if score is not None}
    return [
        histogram(
            run.scores(name, "known"),
            [(plain(part.name, 40), run.scores(name, part.name)) for part in run.summary.unknown],
            score.threshold,
            key=f"histogram{i}",
            title=score.title,
        )
        for i, (name, score) in enumerate(chosen.items())
    ]


@dataclass(frozen=True)
class Mistake:
    """An image that a score takes wrongly, ready to show."""

    image_id: str
    image: str
    score: str
    said: str
    label: str


def load_mistakes(run: DetectRecord) -> list[tuple[str, list[Mistake]]]:
    """Return the stored images by set, the worst first, with a title; files that cannot be read are left out."""
    found: dict[str, list[tuple[int, Mistake]]] = {}
    for path in sorted((run.folder / "gallery").glob("*.safetensors")):
        try:
            require_regular(path)
            with safe_open(path, framework="np") as file:
                image, about = file.get_tensor("image"), file.metadata() or {}
            title = (
                "Known, and refused" if about["known"] == "1" else f"Unknown ({plain(about['set'], 40)}), and accepted"
            )
            mistake = Mistake(
                image_id=plain(about["image_id"]),
                image=data_uri(image),
                score=f"{float(about['score']):.4g}",
                said=_name(run.class_names, int(about["prediction"])),
                label=_name(run.class_names, int(about["label"])),
            )
            found.setdefault(title, []).append((int(about["rank"]), mistake))
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            continue
    return [
        (title, [mistake for _, mistake in sorted(items, key=lambda item: item[0])]) for title, items in found.items()
    ]


def _name(names: list[str], index: int) -> str:
    return plain(names[index], 60) if 0 <= index < len(names) else ""


def _cost(run: DetectRecord) -> list[tuple[str, str]]:
    summary = run.summary
    images = summary.known.images + sum(part.images for part in summary.unknown)
    return [
        ("Images scored", f"{images:,}" + (f", and {summary.fit.images:,} to learn from" if summary.fit else "")),
        ("Encoder", f"{summary.encode_ms:.2f} ms per image"),
        ("Scores", f"at most {max(score.microseconds for score in summary.scores):.0f} µs per image each"),
        ("Time of the last session", duration(summary.seconds)),
    ]

"""The HTML report of a detect run: one file that needs no network and no script."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from safetensors import SafetensorError, safe_open

from robustvlm.core.reading import require_regular
from robustvlm.detect import BASELINES
from robustvlm.report import detect_plots, tables
from robustvlm.report import detect_wording as words
from robustvlm.report.detect_record import DetectRecord, load_detect_run
from robustvlm.report.gallery import data_uri
from robustvlm.report.page import drawing, page, write_page
from robustvlm.report.wording import duration, plain
from robustvlm.runs.detect_summary import OWN, ScoreSummary

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
        auroc=detect_plots.auroc_chart(summary.scores, [part.name for part in summary.unknown], key="auroc"),
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
        detect_plots.Curve(score.title, run.scores(name, "known"), run.scores(name, unknown))
        for name, score in chosen.items()
    ]
    return detect_plots.roc_chart(curves, key=key, unknown=plain(unknown, 40))


def _auroc(score: ScoreSummary, unknown: str) -> float:
    return next(on.auroc.value for on in score.on if on.unknown == unknown)


def _histograms(run: DetectRecord) -> list[Markup]:
    """Draw the score that the report shows, and the best baseline beside it where that is another."""
    scores = {score.name: score for score in run.summary.scores}
    baselines = [scores[name] for name in BASELINES if name in scores]
    best = max(baselines, key=lambda score: sum(on.auroc.value for on in score.on), default=None)
    chosen = {score.name: score for score in (run.shown, best) if score is not None}
    return [
        detect_plots.histogram(
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

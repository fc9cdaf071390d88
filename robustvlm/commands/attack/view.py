"""The HTML report: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from robustvlm.commands.attack import plots
from robustvlm.commands.attack.plots import group_rows, margins, ranking, steps_to_success
from robustvlm.commands.attack.record import AttackedRun, Comparison, compare, findings, load_run, stopped
from robustvlm.commands.attack.summary import EpsSummary, Summary
from robustvlm.commands.attack.terminal import attack_table
from robustvlm.commands.attack.wording import (
    acceptances,
    cosines,
    each_attack_on,
    first_goal,
    headline,
    how_many_attacks,
    open_ended,
    robust_bounds,
    smaller_eps,
    success_bounds,
    verdict,
    words_of,
)
from robustvlm.report import tables, words
from robustvlm.report.page import drawing, load_gallery, page, write_page


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, by default to `report.html` in its folder, whole or not at all; return its path.

    Raises:
        UserError: the folder holds no finished run, or the report cannot be written.
    """
    run = load_run(folder)
    path = out or run.report
    with drawing(folder):
        text = render_run(run)
    write_page(path, text)
    return path


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write a comparison of several runs, by default to `comparison.html` beside the first; return its path.

    Raises:
        UserError: a folder holds no finished attack run, or the page cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    path = out or runs[0].folder.resolve().parent / "comparison.html"
    with drawing(runs[0].folder):
        text = render_comparison(runs, compare(runs))
    write_page(path, text)
    return path


def show(run: AttackedRun, console: Console) -> None:
    """Print what came of a run, and where its report and its rows are."""
    console.print(attack_table(run.summary))
    console.print(Text(f"Report:  {run.report}"), soft_wrap=True)
    console.print(Text(f"Results: {run.folder / 'results.parquet'}"), soft_wrap=True)


def render_run(run: AttackedRun) -> str:
    """Return the report of one run as HTML."""
    summary = run.summary
    at = headline(summary)
    return page(
        "run.html.j2",
        **_WORDS,
        run=run,
        summary=summary,
        at=at,
        words=words_of(summary),
        charts=_charts(run),
        classes=ranking(at.per_class) if at else None,
        superclasses=ranking(at.per_superclass, ends=30) if at else None,
        # The images decided so far are those that fall easily, and say nothing of their classes.
        class_rows=[] if summary.unfinished else group_rows(summary),
        gallery=load_gallery(run.folder / "gallery", run.class_names, run.eps_texts),
        findings=tables.findings(summary.checks),
        cost=tables.cost_rows(summary.cost, summary.estimate),
        manifest=tables.manifest_rows(run.manifest),
    )


def render_comparison(runs: Sequence[AttackedRun], comparisons: Sequence[Comparison]) -> str:
    """Return the comparison of several runs as HTML."""
    keys = [_letter(i) for i in range(len(runs))]
    names = [f"{words.plain(run.name, 60)} ({key})" for run, key in zip(runs, keys, strict=True)]
    norms = list(dict.fromkeys(run.summary.norm for run in runs))
    curves = [
        (
            norm,
            plots.security_curve(
                [_curve(run, key) for run, key in zip(runs, keys, strict=True) if run.summary.norm == norm],
                key=f"curve{i}",
                norm=words.norm_name(norm),
            ),
        )
        for i, norm in enumerate(norms)
    ]
    return page(
        "compare.html.j2",
        **_WORDS,
        runs=runs,
        keys=keys,
        curves=curves,
        conditions=_conditions(runs),
        comparisons=comparisons,
        sentences=findings(comparisons, names),
        remarks=stopped(runs, names),
        largest=[headline(run.summary) for run in runs],
        superclasses=_superclasses(runs),
        manifests=[tables.manifest_rows(run.manifest) for run in runs],
    )


def _verdict_class(summary: Summary) -> str:
    """Return the colour of the verdict by its meaning: good only where a sound, whole run fooled no image."""
    at = headline(summary)
    if summary.unfinished or at is None or not at.attack_success_rate.total:
        return " neutral"
    if at.attack_success_rate.successes:
        return ""
    sound = not at.undecided and all(check.level not in ("fault", "warning") for check in summary.checks)
    return " held" if sound else " neutral"


def _charts(run: AttackedRun) -> dict[str, Markup]:
    """Draw what there is data for."""
    charts: dict[str, Markup] = {}
    summary, at = run.summary, headline(run.summary)
    if at is None or not summary.images.evaluated:
        return charts
    norm = words.norm_name(summary.norm)
    if len(summary.per_eps) > 1:
        charts["curve"] = plots.security_curve([_curve(run, "this run")], key="curve", norm=norm)
    found = margins(run.rows, at.eps)
    if found.clean:
        charts["margins"] = plots.margin_histogram(found, key="margins")
    steps = steps_to_success(run.rows)
    if steps and words_of(summary).leave:
        charts["steps"] = plots.steps_histogram(
            steps, {e: words.plain(t, 20) for e, t in run.eps_texts.items()}, key="steps"
        )
    return charts


def _curve(run: AttackedRun, name: str) -> plots.Curve:
    points = run.summary.per_eps
    return plots.Curve(
        name=name,
        eps=(0.0, *(at.eps for at in points)),
        ticks=("0", *(words.plain(at.eps_text, 20) for at in points)),
        rates=(run.summary.clean_accuracy, *(at.robust_accuracy for at in points)),
        most=(
            run.summary.clean_accuracy_at_most or run.summary.clean_accuracy,
            *(at.robust_accuracy_at_most or at.robust_accuracy for at in points),
        )
        if run.summary.unfinished
        else (),
    )


def _letter(i: int) -> str:
    return chr(ord("A") + i) if i < 26 else f"R{i + 1}"


def _conditions(runs: Sequence[AttackedRun]) -> list[tuple[str, list[tables.Bar | None]]]:
    """Return, per norm and eps of any run, the robust accuracy of each run that has it."""
    radii = sorted({(run.summary.norm, at.eps, at.eps_text) for run in runs for at in run.summary.per_eps})
    rows: dict[tuple[str, float], tuple[str, list[tables.Bar | None]]] = {}
    for norm, eps, text in radii:
        found = [
            next((at for at in run.summary.per_eps if run.summary.norm == norm and at.eps == eps), None) for run in runs
        ]
        label = f"{words.norm_name(norm)} {words.plain(text, 20)}"
        rows.setdefault((norm, eps), (label, [_cell(run, at) for run, at in zip(runs, found, strict=True)]))
    return list(rows.values())


def _cell(run: AttackedRun, at: EpsSummary | None) -> tables.Bar | None:
    """Return robust accuracy as a bar; as bounds where the run stopped early."""
    if at is None:
        return None
    least, most = at.robust_accuracy, at.robust_accuracy_at_most
    if most is not None and open_ended(run.summary, least, most):
        return tables.bounds_bar("", least, most)
    return tables.bar("", least)


def _superclasses(runs: Sequence[AttackedRun]) -> list[tuple[str, list[tables.Bar | None]]]:
    """Return the success rate per superclass at each run's largest eps; nothing of runs that stopped early."""
    by_run: list[dict[str, tables.Bar]] = []
    for run in runs:
        at = None if run.summary.unfinished else headline(run.summary)
        by_run.append({g.name: tables.bar(g.name, g.attack_success_rate) for g in (at.per_superclass if at else [])})
    names = sorted({name for groups in by_run for name in groups})
    return [(words.plain(name, 80), [groups.get(name) for groups in by_run]) for name in names]


_WORDS: dict[str, Callable[..., Any]] = {
    "verdict": verdict,
    "verdict_class": _verdict_class,
    "smaller_eps": smaller_eps,
    "how_many": how_many_attacks,
    "cosines": cosines,
    "acceptances": acceptances,
    "each_attack_on": each_attack_on,
    "robust_bounds": robust_bounds,
    "success_bounds": success_bounds,
    "bounds": words.bounds,
    "open_ended": open_ended,
    "first_goal": first_goal,
}

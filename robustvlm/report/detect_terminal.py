"""The tables that end `robustvlm detect` in the terminal; the numbers are the summary's."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.report import detect_wording as words
from robustvlm.report.wording import percent, plain
from robustvlm.runs.detect_summary import DetectSummary, Measured

_COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def detect_table(summary: DetectSummary) -> RenderableType:
    """Return the closing tables of a detect run: every score on every set, attacks, what was skipped, the verdict."""
    parts: list[RenderableType] = [_scores(summary)]
    if summary.attacked:
        parts.append(_attacked(summary))
    if summary.adversarial is not None:
        parts.append(_adversarial(summary))
    parts += [
        Text(f"{check.level}: {check.message}", style=_COLOURS[check.level])
        for check in summary.checks
        if check.level != "ok"
    ]
    parts += [Text(f"skipped {name}: {plain(reason, 200)}", style="dim") for name, reason in summary.skipped.items()]
    if summary.unreadable:
        first = summary.unreadable[0]
        parts.append(Text(f"{len(summary.unreadable):,} images could not be read; the first, {plain(first.id)}"))
    lines = [words.words_sentence(summary), words.own_sentence(summary), words.attack_sentence(summary)]
    parts += [Text(line) for line in (words.verdict(summary), words.comparison(summary), *lines) if line]
    return Group(*parts)


def _scores(summary: DetectSummary) -> Table:
    sets = ", ".join(f"{part.images:,} {plain(part.name, 40)}" for part in summary.unknown)
    table = _table(f"Known ({summary.known.images:,} images) against unknown ({sets})")
    table.add_column("score")
    for part in summary.unknown:
        table.add_column(Text(f"AUROC {plain(part.name, 40)}"))
        table.add_column("FPR95")
    table.add_column("needs")
    table.add_column("µs", justify="right")
    oracles = words.oracle_titles(summary)
    for score in summary.scores:
        cells = [cell for on in score.on for cell in (_measured(on.auroc), _measured(on.fpr95))]
        style = "bold" if score.name == summary.best else ""
        title = f"{score.title} (oracle)" if score.title in oracles else score.title
        table.add_row(title, *cells, words.needs(score), f"{score.microseconds:.1f}", style=style)
    return table


def _attacked(summary: DetectSummary) -> Table:
    table = _table(f"Under attack (eps {plain(summary.eps_text, 20)}), each score by attacks that know it")
    for name in ("score", "unknown", "AUROC clean", "unknown attacked", "known attacked", "both"):
        table.add_column(name)
    table.add_column("unknown accepted", justify="right")
    table.add_column("known accepted", justify="right")
    for score in summary.attacked:
        for on in score.on:
            aurocs = (on.auroc_clean, on.auroc_intrude, on.auroc_deny, on.auroc_both)
            table.add_row(
                score.title,
                plain(on.unknown, 40),
                *(words.number(value.value) for value in aurocs),
                f"{percent(on.accepted_clean.value)} -> {percent(on.accepted_attacked.value)}",
                f"{percent(score.accepted_clean.value)} -> {percent(score.accepted_attacked.value)}",
            )
    return table


def _adversarial(summary: DetectSummary) -> Table:
    found = summary.adversarial
    assert found is not None, "asked for after a check"
    table = _table(f"Clean against adversarial images ({found.fooled} fooled of {found.attacked}), blind to the scores")
    table.add_column("score")
    table.add_column("AUROC")
    titles = {score.name: score.title for score in summary.scores}
    for name, value in found.auroc.items():
        table.add_row(titles[name], _measured(value))
    return table


def _measured(found: Measured) -> Text:
    return Text.assemble(words.number(found.value), (f" {words.interval(found)}", "dim"))


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)

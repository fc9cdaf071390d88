"""The tables that end `robustvlm attack` in the terminal; the numbers are the summary's."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.commands.attack.plots import ranked
from robustvlm.commands.attack.summary import EpsSummary, GroupSummary, Summary
from robustvlm.commands.attack.wording import (
    acceptances,
    cosines,
    each_attack_on,
    first_goal,
    headline,
    open_ended,
    robust_bounds,
    success_bounds,
    verdict,
    words_of,
)
from robustvlm.report import tables
from robustvlm.report import words as wording
from robustvlm.stats import Rate

_COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}
_NAME_WIDTH = 40


def attack_table(summary: Summary, *, worst: int = 5) -> RenderableType:
    """Return the closing tables of an attack run: by eps, by attack, superclasses, the `worst` classes, checks, cost.

    Superclasses and classes are those of the largest eps, most often fooled first.

    Example:
        >>> from rich.console import Console
        >>> from robustvlm.commands.attack.summary import summarise
        >>> manifest = {"config": {"norm": "Linf", "eps": [], "eps_text": [], "attack": ["pgd"]},
        ...             "data": {"class_names": ["cat"], "superclasses": None}}
        >>> console = Console(width=100)
        >>> with console.capture() as shown:
        ...     console.print(attack_table(summarise([], manifest)))
        >>> "No image was evaluated" in shown.get()
        True
    """
    at = headline(summary)
    parts: list[RenderableType | None] = [_by_eps(summary)]
    if at is not None:
        parts.append(_by_attack(summary))
        parts += [_levels(summary, at), _transfer(summary, at)]
        if not summary.unfinished:  # the images decided so far are those that fall easily: no sample of their class
            parts += _groups("superclass", summary, at.per_superclass, worst=12)
            parts += _groups("class", summary, at.per_class, worst=worst)
        early = bool(summary.unfinished)
        lines = (cosines(at, summary.goal, unfinished=early), acceptances(at, unfinished=early))
        parts += [Text(line) for line in lines if line]
    parts += [_finding(finding) for finding in tables.findings(summary.checks) if finding.level != "ok"]
    parts += [_unreadable(summary), _passes(summary), _cost(summary), Text(""), _verdict(summary)]
    return Group(*[part for part in parts if part is not None])


def _by_eps(summary: Summary) -> Table:
    words = words_of(summary)
    about = "" if words.accuracy else f": {words.title}"
    where = f"{wording.norm_name(summary.norm)}, {summary.clean_accuracy.total:,} images"
    table = _table(
        f"Worst case over the attacks ({where}){about}",
        caption=words.caption,
    )
    table.add_column("eps")
    for name in (words.clean, words.held, "attack success rate"):
        table.add_column(name)
    for at in summary.per_eps:
        table.add_row(
            _name(at.eps_text),
            _clean(summary),
            *_worst_case(at, open_ended=summary.unfinished is not None and at.undecided > 0),
        )
    if not summary.per_eps:
        table.add_row("clean", _clean(summary), Text(wording.DASH), Text(wording.DASH))
    return table


def _clean(summary: Summary) -> Text:
    return _share(summary, summary.clean_accuracy, summary.clean_accuracy_at_most)


def _worst_case(at: EpsSummary, *, open_ended: bool) -> tuple[Text, Text]:
    """Return robust accuracy and success rate; as bounds where a run has not come to some of the images."""
    if open_ended:
        return Text(robust_bounds(at)), Text(success_bounds(at), style="bold")
    return _rate(at.robust_accuracy), _rate(at.attack_success_rate, style="bold")


def _by_attack(summary: Summary) -> Table:
    per_eps, words = summary.per_eps, words_of(summary)
    broke = any(attack.failed for at in per_eps for attack in at.per_attack)
    goal = first_goal(summary)
    table = _table(f"By attack, each on {each_attack_on(words)}{f' ({goal})' if goal else ''}")
    table.add_column("eps", no_wrap=True)
    table.add_column("attack", overflow="fold")
    for name in ("ran on", "fooled", *(["broke off"] if broke else []), "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("accuracy left" if words.accuracy else words.held, no_wrap=True)
    for at in per_eps:
        for i, attack in enumerate(at.per_attack):
            counts = (attack.attacked, attack.fooled, *([attack.failed] if broke else []), attack.passes)
            table.add_row(
                _name(at.eps_text) if i == 0 else Text(""),
                _name(attack.attack),
                *(f"{count:,}" for count in counts),
                _share(summary, attack.robust_accuracy_after, attack.robust_accuracy_after_at_most),
            )
    return table


def _levels(summary: Summary, at: EpsSummary) -> Table | None:
    """Show accuracy at every level of the class tree."""
    if not at.levels:
        return None
    table = _table(
        f"By level of the class tree at eps {wording.plain(at.eps_text, 20)}",
        caption="Right: the prediction lies in the right superclass, unperturbed and at every recorded point.",
    )
    for name in ("level", "clean accuracy", "accuracy under these attacks"):
        table.add_column(name)
    for level in at.levels:
        left = _share(summary, level.robust_accuracy, level.robust_accuracy_at_most)
        table.add_row(_name(level.name), _rate(level.clean_accuracy), left)
    return table


def _transfer(summary: Summary, at: EpsSummary) -> Table | None:
    """Show attacks against each level of the class tree, scored at all levels."""
    if at.transfer is None:
        return None
    table = _table(f"Accuracy left at each level at eps {wording.plain(at.eps_text, 20)}, by the level attacked")
    table.add_column("attacked")
    for name in at.transfer.levels:
        table.add_column(_name(name))
    table.add_row("nothing", *map(_rate, at.transfer.clean_accuracy))
    for row in at.transfer.rows:
        most = row.robust_accuracy_at_most or row.robust_accuracy
        cells = (_share(summary, *pair) for pair in zip(row.robust_accuracy, most, strict=True))
        table.add_row(_name(row.name), *cells)
    return table


def _groups(kind: str, summary: Summary, groups: Sequence[GroupSummary], *, worst: int) -> list[RenderableType]:
    at = headline(summary)
    assert at is not None, "groups are those of the largest eps"
    order = ranked(groups)
    if not order:
        return []
    shown = order[:worst]
    which = (
        f"{len(shown)} of {len(order)}, most often fooled first"
        if len(order) > len(shown)
        else "most often fooled first"
    )
    table = _table(f"By {kind} at eps {wording.plain(at.eps_text, 20)} ({which})")
    table.add_column(kind)
    table.add_column(words_of(summary).before, justify="right")
    table.add_column("attack success rate")
    for group in shown:
        table.add_row(
            _name(group.name), f"{group.clean_correct:,} of {group.images:,}", _rate(group.attack_success_rate)
        )
    return [table]


def _finding(finding: tables.Finding) -> Text:
    return Text.assemble(
        (f"{finding.sign} {finding.word}: ", _COLOURS[finding.level]), f"{finding.name}: {finding.message}"
    )


def _unreadable(summary: Summary) -> Text | None:
    count = summary.images.unreadable
    if not count:
        return None
    first = summary.unreadable[0]
    example = f"{wording.plain(first.id, 60)}: {wording.plain(first.reason, 80)}"
    return Text.assemble(
        (f"! {count:,} unreadable, left out: ", _COLOURS["warning"]), example + (", ..." if count > 1 else "")
    )


def _passes(summary: Summary) -> Table | None:
    """Show what the encoder passes were made for, down to their sum."""
    rows = tables.pass_rows(summary.cost)
    if not rows:
        return None
    table = _table("Encoder passes")
    table.add_column("made for")
    table.add_column("passes", justify="right")
    for label, count in rows:
        table.add_row(Text(label), f"{count:,}")
    return table


def _cost(summary: Summary) -> Text:
    cost = summary.cost
    return Text(
        f"Spent {cost.forward_passes:,} forward and {cost.backward_passes:,} backward passes"
        f" in {wording.duration(cost.seconds)} ({cost.passes_per_second:,.0f} passes/s).",
        style="dim",
    )


def _verdict(summary: Summary) -> Text:
    return Text(verdict(summary), style="bold")


def _rate(rate: Rate, *, style: str = "") -> Text:
    if not rate.total:
        return Text(wording.DASH, style="dim")
    return Text.assemble((wording.percent(rate.value), style), (f"  {wording.interval(rate)}", "dim"))


def _share(summary: Summary, least: Rate, most: Rate | None) -> Text:
    """Show a rate; as bounds where a run that stopped early does not know it yet."""
    return Text(wording.bounds(least, most)) if open_ended(summary, least, most) else _rate(least)


def _name(text: str) -> Text:
    """Names are data: never markup, one line, bounded."""
    return Text(wording.plain(text, _NAME_WIDTH))


def _table(title: str, *, caption: str | None = None) -> Table:
    return Table(
        title=Text(title, style="bold"),
        caption=None if caption is None else Text(caption, style="dim"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )

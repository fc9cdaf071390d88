"""What a report says, before anything is drawn: values that the terminal and the page both read.

A command describes its run once, as a Report made of Sections of blocks. `report/screen.py` shows it in a terminal,
`report/page.py` writes it as HTML. Texts in it may come from anyone: both renderers escape, cut and straighten them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from markupsafe import Markup

from robustvlm.report.words import DASH, RANGE, Bar, Finding, copies_counted, count_of, interval, moment, percent, plain
from robustvlm.runs.records import Check
from robustvlm.stats import Mean, Rate
from robustvlm.text import format_between, format_between_significant

_LONGEST = 4000  # characters of a text that has no bound of its own
Where = Literal["both", "page", "terminal"]


@dataclass(frozen=True)
class Code:
    """A word for a computer: a spec, a path, a command."""

    text: str
    limit: int = 200


@dataclass(frozen=True)
class Name:
    """A word from outside, such as a class name, which may be written from right to left."""

    text: str
    limit: int = 80


@dataclass(frozen=True)
class Small:
    """A word of less weight beside another."""

    text: str


@dataclass(frozen=True)
class Measure:
    """A measured number in words, and its 95% interval if it has one; both once more as numbers, for programs.

    Example:
        >>> from robustvlm.stats import rate
        >>> Measure.of(rate(1, 2)).text, Measure.of(None).text, Measure.of(0.25).text
        ('50.0%', '—', '0.25')
        >>> Measure.between(0.8456, 0.8006, 0.9).interval.replace(RANGE, " to ")
        '0.800 to 0.900'
    """

    text: str
    interval: str = ""
    value: float | None = field(default=None, compare=False)
    low: float | None = field(default=None, compare=False)
    high: float | None = field(default=None, compare=False)

    @classmethod
    def of(cls, found: Rate | Mean | float | None) -> Measure:
        """Return a rate as a percentage and any other number with its digits, each with the interval it carries."""
        if isinstance(found, Rate):
            if not found.total:
                return cls(percent(found.value))
            return cls(percent(found.value), interval(found), found.value, found.low, found.high)
        if isinstance(found, Mean):
            if found.value is None:
                return cls(DASH)
            if found.low is None or found.high is None:
                return cls(f"{found.value:.4g}", value=found.value)
            reach = RANGE.join(format_between_significant(found.low, found.high))
            return cls(f"{found.value:.4g}", reach, found.value, found.low, found.high)
        return cls(DASH if found is None else f"{found:.4g}", value=found)

    @classmethod
    def bare(cls, found: Rate | float | None) -> Measure:
        """Return a share as a percentage alone; programs have its interval too."""
        if isinstance(found, Rate):
            return cls(percent(found.value), "", found.value, *((found.low, found.high) if found.total else ()))
        return cls(percent(found), value=found)

    @classmethod
    def between(cls, value: float, low: float, high: float, digits: int = 3) -> Measure:
        """Return a metric in [0, 1], such as an AUROC, with its interval, rounded outwards."""
        return cls(f"{value:.{digits}f}", RANGE.join(format_between(low, high, digits)), value, low, high)


Inline = str | Code | Name | Small | Measure
Line = Inline | Sequence[Inline]
"""A line of text: one word or several, put side by side as they are (spaces are the author's)."""

Row = Sequence[Line] | str


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is how loud it is. Those that lead a section, which explain it, are for the page."""

    line: Line
    kind: Literal["plain", "lead", "small"] = "plain"
    only: Where = "both"


@dataclass(frozen=True)
class Column:
    """A column of a table. Columns side by side with one `group` stand under it as a second heading."""

    title: Line
    number: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns, the first cell of each the row's name; a row that is a text heads the rows below it.

    Args:
        title: for the terminal, the section's title where there is none.
        strong: the rows that stand out.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    title: str = ""
    caption: Line = ""
    strong: frozenset[int] = frozenset()
    only: Where = "both"


@dataclass(frozen=True)
class Facts:
    """Labels and values: a short list, a table of sentences, or settings in the letters of a computer."""

    rows: Sequence[tuple[str, Line]]
    kind: Literal["list", "sentences", "settings"] = "list"
    title: str = ""
    only: Where = "page"


@dataclass(frozen=True)
class Chart:
    """A drawing for the page, made when the page is; `text` says the same in the terminal, or nothing."""

    draw: Callable[[], Markup]
    title: str = ""
    caption: Line = ""
    text: str = ""


@dataclass(frozen=True)
class Verbatim:
    """Lines to be copied as they are, for the page alone."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Checks:
    """What was checked and found, gravest first; `none` is said on the page where nothing was found."""

    findings: Sequence[Finding]
    none: str = ""


@dataclass(frozen=True)
class Bars:
    """Rates as bars with their intervals, for the page alone; `half` for one of two columns, `good`: more is better."""

    bars: Sequence[Bar]
    caption: str
    title: str = ""
    half: bool = False
    good: bool = False


@dataclass(frozen=True)
class Picture:
    """One or more pictures side by side: (data URI, what it is for who cannot see it, words below) and a line."""

    images: Sequence[tuple[str, str, str]]
    line: Line
    title: Line = ""


@dataclass(frozen=True)
class Pictures:
    """A gallery, for the page alone; `small` for six in a row."""

    pictures: Sequence[Picture]
    title: str = ""
    small: bool = False


@dataclass(frozen=True)
class Pair:
    """Blocks in two columns, where the page is wide enough."""

    blocks: Sequence[Block]


@dataclass(frozen=True)
class More:
    """Blocks behind a line to click on: on the page alone."""

    summary: Line
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Closing:
    """Where things are; the last lines in the terminal, never broken, so that paths can be copied."""

    places: Mapping[str, object]


Block = Text | Table | Facts | Chart | Verbatim | Bars | Checks | Pictures | Pair | More | Closing


@dataclass(frozen=True)
class Section:
    """A titled part of a report; `key` is its anchor, `short` its name in the navigation ("" leaves it out).

    A section whose blocks are all for the terminal is left out of the page.
    """

    title: str
    blocks: Sequence[Block]
    key: str = ""
    short: str = ""


@dataclass(frozen=True)
class Card:
    """A number to be seen first: a rate with its bar, or any text."""

    what: str
    value: Rate | str
    small: str
    good: bool = False


@dataclass(frozen=True)
class Verdict:
    """The outcome in a few sentences; `tone` is its colour: "held" green, "" red, "neutral" neither."""

    lines: Sequence[Line]
    tone: str = "neutral"

    @property
    def sense(self) -> tuple[str, str] | None:
        """Sign and word of the tone, for who sees no colours; None of a neutral one."""
        return {"held": ("✓", "Good"), "": ("✕", "Bad")}.get(self.tone)


@dataclass(frozen=True)
class Report:
    """All that is said of one run.

    Args:
        kind: what sort of report ("training report"), for the title of the page.
        kicker: the line above the name; facts: the line below it.
    """

    kind: str
    name: str
    kicker: str
    facts: Line
    verdicts: Sequence[Verdict]
    sections: Sequence[Section]
    cards: Sequence[Card] = ()
    footer: str = ""

    @property
    def faults(self) -> int:
        """Number of checks that found a fault, anywhere in the report."""
        blocks = [block for section in self.sections for block in section.blocks]
        found = [finding for block in blocks if isinstance(block, Checks) for finding in block.findings]
        return sum(finding.level == "fault" for finding in found)


def parts_of(line: Line) -> Sequence[Inline]:
    """Return the words of a line one by one."""
    return [line] if isinstance(line, (str, Code, Name, Small, Measure)) else line


def straight(words: str) -> str:
    """Return words without what moves a cursor or reverses a line, of bounded length; spaces at the ends stay.

    Example:
        >>> straight(" a\x1b[2J ")
        ' a [2J '
    """
    if not words.strip():
        return " " if words else ""
    return " " * words[0].isspace() + plain(words, _LONGEST) + " " * words[-1].isspace()


def numbers(*titles: Line) -> list[Column]:
    """Return columns of numbers, aligned on the right."""
    return [Column(title, number=True) for title in titles]


def facts_line(manifest: Mapping[str, Any], *more: Inline) -> list[Inline]:
    """Return the line below a run's name: its model and data, whatever is put behind them, and when it began."""
    config, created = manifest["config"], manifest.get("created")
    start: list[Inline] = ["Model ", Code(config["model"]), " on ", Code(config["data"]), *more]
    return [*start, f", {moment(created)}"] if created else start


def ungrouped_footer(manifest: Mapping[str, Any], checks: Sequence[Check], worth: float | None) -> str:
    """Return the footer of a report whose intervals count every image; "", the usual one, where none is a copy.

    The usual one also where intervals count copies once, as all but those of earlier runs do (`worth` is not None), or
    where a check says of these very images that they do not.
    """
    if worth is not None or any(check.name == "copies" for check in checks):
        return ""
    copies = copies_counted(manifest["config"].get("data"))
    return f"Intervals are exact 95% Clopper{RANGE}Pearson intervals; bars carry them as whiskers. {copies}" * bool(
        copies
    )


def cost_section(rows: Sequence[tuple[str, Line]]) -> Section:
    """Return the section on what a run cost."""
    return Section("Cost", [Facts(rows)], key="cost", short="Cost")


def left_out(reasons: Sequence[tuple[str, str]], what: str) -> list[Block]:
    """Return what is said of images that were left out, with their reasons: all of them on the page, up to 1,000."""
    if not reasons:
        return []
    count = f"{count_of(len(reasons), 'images')} {what}"
    rows = [(Code(name), plain(reason)) for name, reason in reasons[:1000]]
    first = f"{count}; the first, {plain(reasons[0][0], 60)}: {plain(reasons[0][1], 80)}"
    more = More(count, [Table([Column("Image"), Column("Reason")], rows)])
    return [more, Text(first, only="terminal")]


def terminal_blocks(report: Report) -> Iterator[Block | Verdict]:
    """Yield what the terminal shows of a report, in its order: the verdicts, then the sections' blocks.

    The first table of a section has the section's title, where it has none of its own.
    """
    yield from report.verdicts
    for section in report.sections:
        title = section.title
        for block in flat(section.blocks):
            if isinstance(block, (Table, Facts)) and block.only != "page":
                yield block if block.title else replace(block, title=title)
                title = title if block.title else ""
            else:
                yield block


def flat(blocks: Iterable[Block | Verdict]) -> Iterator[Block | Verdict]:
    """Yield the blocks with those of pairs in the place of their pair."""
    for block in blocks:
        if isinstance(block, Pair):
            yield from flat(block.blocks)
        else:
            yield block

"""A report for programs: one JSON document of the same sections, numbers beside words, by a schema that is kept here.

`report.schema.json` beside this file is the schema (JSON Schema 2020-12), made from the classes below; `FORMAT` grows
when a reader of the one before would go wrong. Fields may be added within a format: readers pass over what they do not
know.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from robustvlm import __version__
from robustvlm.report import sections as doc
from robustvlm.report.copies import table_of, titles_of, words_of
from robustvlm.report.words import Finding, plain
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import Rate
from robustvlm.text import secrets_cut

FORMAT = 1
SCHEMA = Path(__file__).with_name("report.schema.json")
_LONG = 4000
_NUMBER = re.compile(
    r"(?P<digits>[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?))(?P<percent>%?)", re.ASCII
)

# What is put into a document: finished runs with what is said of them


@dataclass(frozen=True)
class Gate:
    """A condition put to a run, and whether it holds: then the gate is shut."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Told:
    """A finished run, all that is said of it, and the conditions that were put to it."""

    run: FinishedRun[Any]
    report: doc.Report
    gates: Sequence[Gate] = ()


@dataclass(frozen=True)
class LeftOut:
    """A folder of which nothing is told, and why; `fault`: a run was to be read there, and could not be."""

    folder: Path
    reason: str
    fault: bool = True


@dataclass(frozen=True)
class Batch:
    """Runs that are told of together, and the comparison of all of them, where there is one."""

    runs: Sequence[Told]
    comparison: doc.Report | None = None
    left_out: Sequence[LeftOut] = ()

    @property
    def reports(self) -> list[tuple[str, str, doc.Report]]:
        """Name, kind and report of everything in it, the comparison first."""
        first = [] if self.comparison is None else [("comparison", "comparison", self.comparison)]
        return first + [(plain(told.run.name), told.run.kind, told.report) for told in self.runs]


def findings_of(report: doc.Report) -> list[Finding]:
    """Return all that was checked, in the order of the report, what was found in order included."""
    blocks = (block for section in report.sections for _, block in leaves(section.blocks))
    return [finding for block in blocks if isinstance(block, doc.Checks) for finding in block.findings]


def leaves(blocks: Sequence[doc.Block], title: str = "") -> Iterator[tuple[str, doc.Block]]:
    """Yield the blocks that the page shows, those inside others in their place, each with the title it stands under."""
    for block in blocks:
        if isinstance(block, doc.Pair):
            yield from leaves(block.blocks, title)
        elif isinstance(block, doc.More):
            yield from leaves(block.blocks, words_of(block.summary))
        elif not isinstance(block, doc.Closing) and getattr(block, "only", "both") != "terminal":
            own = getattr(block, "title", "")
            yield words_of(own) or title, block


# The document: every class is a part of the schema


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cell(_Part):
    """Words as the page shows them; for a measured number also the number with all its digits, and its 95% interval.

    Shares are in [0, 1]. Words that are a number and nothing else have the digits that are written. null: there is no
    such number, or it is not finite; the words say which.
    """

    text: str
    interval: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None


class Words(_Part):
    """A paragraph."""

    type: Literal["text"] = "text"
    text: str


class Grid(_Part):
    """A table: the first cell of a row is its name. `part` heads the rows from it on, "" for none."""

    class Row(_Part):
        """Cells, one a column, and the heading that the row stands under."""

        part: str = ""
        cells: list[Cell]

    type: Literal["table"] = "table"
    title: str
    columns: list[str]
    rows: list[Row]
    caption: str = ""


class CheckFound(_Part):
    """A check and what it found; `rule` is its name for programs, the same in every run and for every set."""

    level: Literal["ok", "note", "warning", "fault"]
    rule: str
    name: str
    message: str
    meaning: str = ""


class ChecksFound(_Part):
    """What was checked."""

    type: Literal["checks"] = "checks"
    checks: list[CheckFound]


class Lines(_Part):
    """Lines to be taken as they are, such as BibTeX."""

    type: Literal["verbatim"] = "verbatim"
    title: str
    text: str


class Drawing(_Part):
    """A chart or pictures, which only the page has: what is to be seen there."""

    type: Literal["drawing"] = "drawing"
    title: str
    captions: list[str]


class Part(_Part):
    """A titled part of a report; `key` is its anchor on the page."""

    key: str
    title: str
    blocks: list[Annotated[Words | Grid | ChecksFound | Lines | Drawing, Field(discriminator="type")]]


class Sentences(_Part):
    """The outcome in sentences; good, bad or neither is the colour they have on the page."""

    tone: Literal["good", "bad", "neutral"]
    lines: list[str]


class Figure(_Part):
    """A number to be seen first."""

    what: str
    value: Cell
    note: str
    more_is_better: bool


class ReportTold(_Part):
    """All that is said of one run, or of a comparison."""

    title: str
    about: str
    verdicts: list[Sentences]
    figures: list[Figure]
    sections: list[Part]
    footer: str


class Condition(_Part):
    """A condition of --fail-if, and whether it holds, which fails the gate."""

    text: str
    holds: bool


class RunTold(_Part):
    """A run: what it is, its report, every check, the conditions put to it, and its summary as the run wrote it."""

    name: str
    folder: str
    command: str
    id: str | None
    created: str | None
    model: str | None
    data: str | None
    report: ReportTold
    checks: list[CheckFound]
    conditions: list[Condition]
    summary: dict[str, Any]


class Missing(_Part):
    """A folder of which nothing is told, and why; `fault`: a run there could not be read."""

    folder: str
    reason: str
    fault: bool


class Document(_Part):
    """What `robustvlm report --format json` prints. Numbers that are not finite are null everywhere."""

    format: Literal[1] = 1
    program: str
    runs: list[RunTold]
    comparison: ReportTold | None
    left_out: list[Missing]


def schema() -> str:
    """Return the schema of a document as JSON text, made from the classes here."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Document.model_json_schema(
        mode="serialization"
    )
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def as_json(batch: Batch) -> str:
    """Return runs as the JSON text of a `Document`."""
    return json.dumps(finite(document(batch).model_dump()), indent=2, ensure_ascii=False, allow_nan=False)


def document(batch: Batch) -> Document:
    """Return what is said of runs as a document."""
    return Document(
        program=f"robustvlm {__version__}",
        runs=[_run(told) for told in batch.runs],
        comparison=None if batch.comparison is None else _told(batch.comparison),
        left_out=[
            Missing(folder=plain(one.folder, _LONG), reason=plain(one.reason, _LONG), fault=one.fault)
            for one in batch.left_out
        ],
    )


def finite(value: Any) -> Any:
    """Return plain data with None in place of numbers that JSON cannot hold.

    Example:
        >>> finite({"a": [1.0, float("nan")], "b": float("-inf")})
        {'a': [1.0, None], 'b': None}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def summary_of(run: FinishedRun[Any]) -> dict[str, Any]:
    """Return a run's summary as plain data that JSON can hold, without secrets."""
    found = run.summary if isinstance(run.summary, dict) else run.summary.model_dump(mode="json")
    kept: dict[str, Any] = secrets_cut(finite(found))
    return kept


def rule_of(finding: Finding) -> str:
    """Return a check's name for programs: what stands before a comma, in small letters and dashes.

    Example:
        >>> from robustvlm.report.words import finding
        >>> rule_of(finding("warning", "...", "Gradient masking, after 500 steps"))
        'gradient-masking'
    """
    words = "".join(char if char.isalnum() else " " for char in finding.name.partition(",")[0].casefold()).split()
    return "-".join(words) or "remark"


def _run(told: Told) -> RunTold:
    ident, created = told.run.manifest.get("id"), told.run.manifest.get("created")
    model, data = specs_of(told.run)
    return RunTold(
        name=plain(told.run.name, _LONG),
        folder=plain(told.run.folder, _LONG),
        command=told.run.kind,
        id=_text(ident),
        created=_text(created),
        model=_text(model),
        data=_text(data),
        report=_told(told.report),
        checks=[_check(finding) for finding in findings_of(told.report)],
        conditions=[Condition(text=gate.text, holds=gate.holds) for gate in told.gates],
        summary=summary_of(told.run),
    )


def specs_of(run: FinishedRun[Any]) -> tuple[str | None, str | None]:
    """Return what model and what data a run is of, as they were given."""
    config = run.manifest.get("config") or {}
    found = [(run.manifest.get(what) or {}).get("spec") or config.get(what) for what in ("model", "data")]
    return _text(found[0]), _text(found[1])


def _text(value: object) -> str | None:
    return None if value is None else plain(value, _LONG)


def _told(report: doc.Report) -> ReportTold:
    tones: dict[str, Literal["good", "bad"]] = {"held": "good", "": "bad"}
    return ReportTold(
        title=f"{plain(report.kicker, 200)}: {plain(report.name, 200)}",
        about=words_of(report.facts, _LONG),
        verdicts=[
            Sentences(tone=tones.get(verdict.tone, "neutral"), lines=[words_of(line, _LONG) for line in verdict.lines])
            for verdict in report.verdicts
        ],
        figures=[
            Figure(what=plain(card.what), value=_shown(card.value), note=plain(card.small), more_is_better=card.good)
            for card in report.cards
        ],
        sections=[_section(section) for section in report.sections],
        footer=plain(report.footer, _LONG),
    )


def _shown(value: Rate | str) -> Cell:
    return Cell(text=plain(value)) if isinstance(value, str) else cell_of(doc.Measure.of(value))


def _section(section: doc.Section) -> Part:
    blocks = [made for title, block in leaves(section.blocks) if (made := _block(title, block)) is not None]
    return Part(key=section.key, title=plain(section.title), blocks=blocks)


def _block(title: str, block: doc.Block) -> Words | Grid | ChecksFound | Lines | Drawing | None:
    if isinstance(block, doc.Text):
        return Words(text=words_of(block.line, _LONG))
    if isinstance(block, doc.Checks):
        return ChecksFound(checks=[_check(finding) for finding in block.findings])
    if isinstance(block, doc.Verbatim):
        return Lines(title=title, text=block.text)
    if isinstance(block, doc.Chart):
        captions = [words_of(block.caption, _LONG), plain(block.text, _LONG)]
        return Drawing(title=title, captions=[caption for caption in captions if caption])
    if isinstance(block, doc.Pictures):
        lines = [f"{words_of(one.title)} {words_of(one.line, _LONG)}".strip() for one in block.pictures]
        return Drawing(title=title, captions=lines)
    if isinstance(block, doc.Table | doc.Facts | doc.Bars):
        return _grid(title, block)
    return None


def _grid(title: str, block: doc.Table | doc.Facts | doc.Bars) -> Grid:
    table = table_of(block)
    heads, rows, part = titles_of(table), [], ""
    for row in table.rows:
        if isinstance(row, str):
            part = plain(row, _LONG)
        else:
            rows.append(Grid.Row(part=part, cells=[cell_of(cell) for cell in row]))
    return Grid(title=title or plain(table.title), columns=heads, rows=rows, caption=words_of(table.caption, _LONG))


def cell_of(cell: doc.Line) -> Cell:
    """Return a cell of a table, with its number where it is a number and nothing else.

    Example:
        >>> [cell_of(text).value for text in ("1,234", "12.5%", "3 of 4", "1e-05")], cell_of(doc.Name("7")).value
        ([1234.0, 0.125, None, 1e-05], None)
    """
    parts = doc.parts_of(cell)
    alone = parts[0] if len(parts) == 1 else None
    if not isinstance(alone, doc.Measure):
        text = words_of(cell, _LONG)
        # A class may be called "7".
        named = any(isinstance(part, doc.Name | doc.Code) for part in parts)
        return Cell(text=text, value=None if named else _number_in(text))
    numbers = {name: finite(getattr(alone, name)) for name in ("value", "low", "high")}
    text, reach = doc.straight(alone.text), doc.straight(alone.interval)
    return Cell(text=text, interval=reach or None, **numbers)


def _number_in(text: str) -> float | None:
    """Return the number that a text is, a percentage as a share; None for any other text."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    value = float(found["digits"].replace(",", ""))
    return finite(float(f"{value / 100:.12g}") if found["percent"] else value)


def _check(finding: Finding) -> CheckFound:
    return CheckFound(
        level=finding.level,  # type: ignore[arg-type]  # one of LEVELS
        rule=rule_of(finding),
        name=plain(finding.name),
        message=plain(finding.message, _LONG),
        meaning=plain(finding.meaning, _LONG),
    )

"""A report as text for others: Markdown, LaTeX and CSV of whole reports, and the one way to all formats."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

from markupsafe import escape

from robustvlm.report import sections as doc
from robustvlm.report.checked import as_junit, as_sarif
from robustvlm.report.copies import escape_latex, escape_markdown, latex, markdown, table_of, tame, titles_of, words_of
from robustvlm.report.document import Batch, as_json, cell_of, leaves
from robustvlm.report.words import DASH, Finding, plain

_LONG = 4000
HEADS = ("run", "kind", "section", "table", "part", "row", "column", "text", "value", "low", "high")
"""Columns of the CSV: a line a cell, so that every table of every run fits below one heading."""


def written(batch: Batch, form: str) -> str:
    """Return runs in one of `FORMATS`, without a line break at the end."""
    return FORMATS[form](batch)


# Markdown, as GitHub shows it in comments and job summaries


def as_markdown(batch: Batch) -> str:
    """Return everything that the page says but its charts and pictures."""
    parts = [text for _, _, report in batch.reports for text in _page(report)]
    if batch.left_out:
        lines = [f"* {escape_markdown(str(one.folder))}: {escape_markdown(one.reason)}" for one in batch.left_out]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(parts)


def _page(report: doc.Report) -> Iterator[str]:
    yield f"# {escape_markdown(f'{report.kicker}: {report.name}')}"
    if facts := words_of(report.facts, _LONG):
        yield escape_markdown(facts, _LONG)
    for verdict in report.verdicts:
        sign = f"**{' '.join(verdict.sense)}:** " if verdict.sense else ""
        yield sign + "  \n".join(escape_markdown(words_of(line, _LONG), _LONG) for line in verdict.lines)
    for section in report.sections:
        if blocks := list(_blocks(section.blocks)):
            yield f"## {escape_markdown(section.title)}"
            yield from blocks
    if report.footer:
        yield escape_markdown(report.footer, _LONG)


def _blocks(blocks: Sequence[doc.Block]) -> Iterator[str]:
    for block in blocks:
        if isinstance(block, doc.Pair):
            yield from _blocks(block.blocks)
        elif isinstance(block, doc.More):
            if inside := list(_blocks(block.blocks)):
                yield f"<details><summary>{escape(words_of(block.summary))}</summary>"
                yield from inside
                yield "</details>"
        elif getattr(block, "only", "both") != "terminal":
            yield from _block(block)


def _block(block: doc.Block) -> Iterator[str]:
    if isinstance(block, doc.Text):
        yield escape_markdown(words_of(block.line, _LONG), _LONG)
    elif isinstance(block, doc.Checks):
        found = [_finding(finding) for finding in block.findings]
        if found or block.none:
            yield "\n".join(found) or escape_markdown(block.none)
    elif isinstance(block, doc.Verbatim):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", block.text))])
        if block.title:
            yield f"**{escape_markdown(block.title)}**"
        yield f"{fence}\n{block.text}\n{fence}"
    elif isinstance(block, doc.Table | doc.Facts | doc.Bars):
        table = table_of(block)
        if table.rows:
            if title := words_of(table.title):
                yield f"**{escape_markdown(title)}**"
            yield markdown(table)
            if caption := words_of(table.caption, _LONG):
                yield escape_markdown(caption, _LONG)


def _finding(finding: Finding) -> str:
    said = f"**{escape_markdown(finding.name)}**: {escape_markdown(finding.message)}" if finding.name else ""
    meaning = f" {escape_markdown(finding.meaning)}" if finding.meaning and finding.level != "ok" else ""
    return f"* {finding.sign} {finding.word}: {said or escape_markdown(finding.message)}{meaning}"


# LaTeX: the sentences and the tables of a report, to be read into a paper


def as_latex(batch: Batch) -> str:
    """Return sentences and tables; settings and what is to be copied are left to `report --methods` and the page."""
    return "\n\n".join(part for _, _, report in batch.reports for part in _paper(report))


def _paper(report: doc.Report) -> Iterator[str]:
    yield f"\\section*{{{escape_latex(f'{report.kicker}: {report.name}')}}}"
    for verdict in report.verdicts:
        yield "\n".join(escape_latex(words_of(line, _LONG)) for line in verdict.lines)
    for section in report.sections:
        tables = list(_tables(section))
        if tables:
            yield f"\\subsection*{{{escape_latex(plain(section.title))}}}"
        for title, table in tables:
            head = f"\\paragraph{{{escape_latex(title)}}}" if title else "\\noindent"
            caption = words_of(table.caption, _LONG)
            yield "\n".join([head, latex(table), *([f"\n{escape_latex(caption)}"] if caption else [])])


def _tables(section: doc.Section) -> Iterator[tuple[str, doc.Table]]:
    for title, block in leaves(section.blocks):
        settings = isinstance(block, doc.Facts) and block.kind == "settings"
        if isinstance(block, doc.Table | doc.Facts | doc.Bars) and not settings:
            table = table_of(block)
            if table.rows:
                yield title or words_of(table.title), table


# CSV: one table for all tables of all runs


def as_csv(batch: Batch) -> str:
    """Return every cell of every table as a line below `HEADS`; what has no number has empty fields there."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADS)
    for name, kind, report in batch.reports:
        for section in report.sections:
            for title, block in leaves(section.blocks):
                if isinstance(block, doc.Table | doc.Facts | doc.Bars):
                    table = table_of(block)
                    where = (name, kind, section.title, title or words_of(table.title))
                    writer.writerows([tame(str(field)) for field in (*where, *line)] for line in _lines(table))
    return stream.getvalue().rstrip("\n")


def _lines(table: doc.Table) -> Iterator[tuple[object, ...]]:
    heads, part = titles_of(table), ""
    for row in table.rows:
        if isinstance(row, str):
            part = plain(row, 600)
            continue
        cells = [cell_of(cell) for cell in row]
        for head, cell in list(zip(heads, cells, strict=True))[len(cells) > 1 :]:
            numbers = ["" if number is None else f"{number!r}" for number in (cell.value, cell.low, cell.high)]
            yield part, cells[0].text, head, "" if cell.text == DASH else cell.text, *numbers


FORMATS: dict[str, Callable[[Batch], str]] = {
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
    "csv": as_csv,
    "junit": as_junit,
    "sarif": as_sarif,
}
"""Every format by its name on the command line."""

"""The page every report is: one HTML file that needs no network and no script, made of a template and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustvlm import __version__
from robustvlm.core.foreign_text import one_line
from robustvlm.errors import UserError
from robustvlm.report import tables, wording
from robustvlm.report.sections import (
    Block,
    Closing,
    Code,
    Column,
    Line,
    Measure,
    Name,
    Report,
    Small,
    parts_of,
    straight,
)
from robustvlm.runs.files import write_text


def page(template: str, **values: Any) -> str:
    """Return a template of this package filled with `values`, everything in them escaped; a value it lacks raises."""
    return _environment().get_template(template).render(**values)


def page_of(report: Report) -> str:
    """Return a report as a page.

    Example:
        >>> from robustvlm.report.sections import Section, Text, Verdict
        >>> report = Report("test", "run", "Test", "on data", [Verdict(["<b>"])], [Section("One", [Text("two")])])
        >>> "<p>&lt;b&gt;</p>" in page_of(report)
        True
    """
    return page("report.html.j2", report=report)


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all; UserError where that cannot be done."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write the report to '{path}': {error.strerror or error}") from error


@contextmanager
def drawing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong inside while a report is drawn into one line: the run's numbers are there all the same."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error, limit=200)}"
        raise UserError(
            f"the report of '{folder}' could not be drawn ({said}); its numbers are whole, in summary.json beside it: "
            "please report this with that file"
        ) from error


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robustvlm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        plain=wording.plain,
        percent=wording.percent,
        interval=wording.interval,
        moment=wording.moment,
        norm=wording.norm_name,
        sentence=wording.sentence,
        line=_line,
        heads=_heads,
        on_page=_on_page,
        kind=lambda block: type(block).__name__,
    )
    environment.globals.update(version=__version__, bar=tables.bar)
    return environment


def _line(line: Line) -> Markup:
    """Return a line of text as HTML; `format` escapes what is put in."""
    return Markup("").join(_word(part) for part in parts_of(line))


def _word(part: str | Code | Name | Small | Measure) -> Markup:
    if isinstance(part, Code):
        return Markup("<code>{}</code>").format(wording.plain(part.text, part.limit))
    if isinstance(part, Name):
        return Markup("<bdi>{}</bdi>").format(wording.plain(part.text, part.limit))
    if isinstance(part, Small):
        return Markup('<span class="small">{}</span>').format(straight(part.text))
    if isinstance(part, Measure):
        text = Markup("<strong>{}</strong>").format(straight(part.text))
        return (
            text + Markup(' <span class="small">{}</span>').format(straight(part.interval)) if part.interval else text
        )
    return Markup("{}").format(straight(part))


def _heads(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Return the cells of the upper row of headings: groups of columns, and single columns, which reach down."""
    heads: list[dict[str, Any]] = []
    for group, some in groupby(columns, key=lambda column: column.group):
        if group:
            heads.append({"name": group, "title": None, "columns": list(some)})
        else:
            heads += [{"name": "", "title": column.title, "columns": [column]} for column in some]
    return heads


def _on_page(blocks: Sequence[Block]) -> list[Block]:
    return [
        block for block in blocks if not isinstance(block, Closing) and getattr(block, "only", "both") != "terminal"
    ]

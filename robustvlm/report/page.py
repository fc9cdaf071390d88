"""The page every report is: one HTML file that needs no network and no script, made of a template and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from robustvlm import __version__
from robustvlm.core.foreign_text import one_line
from robustvlm.errors import UserError
from robustvlm.report import tables, wording
from robustvlm.runs.files import write_text


def page(template: str, **values: Any) -> str:
    """Return a template of this package filled with `values`, everything in them escaped; a value it lacks raises."""
    return _environment().get_template(template).render(**values)


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
    )
    environment.globals.update(version=__version__, bar=tables.bar)
    return environment

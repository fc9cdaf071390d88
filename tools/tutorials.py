"""Tutorials are pages of Markdown: this makes notebooks of them, runs these, and compares what the pages show.

    python -m tools.tutorials                       # notebooks without results, into build/notebooks
    python -m tools.tutorials --run                 # execute them; fails if a cell does, or a page shows other words
    python -m tools.tutorials --run --refresh       # the same, and the pages get the figures of the run

The page is the one source. In it

* a block ```sh is a command, ```python a cell; a Python block whose first line is `# name.py` is a file to be written;
* a block ```text after one of these is output of it: lines of it in their order, `...` where lines are left out.
  Lines are compared without their figures, which may differ in the last digits from machine to machine;
* `<!-- in the tests: --limit 2 -->` before a command sets options, `<!-- in the tests: a => b -->` before Python
  replaces text, `<!-- in the tests: left out -->` leaves it out, so that `make test` runs the same page on less.

Needs `nbclient` and `ipykernel` to run (the extra `docs`).
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs/tutorials"
OUT = ROOT / "build/notebooks"
SKIP = "skip-execution"
INSTALL = """\
# On Colab or a bare machine: upload the wheel that `make packaging` leaves in dist/ first, as there is no release yet.
import importlib.util

if importlib.util.find_spec("robustvlm") is None:
    %pip install --quiet ./robustvlm-*.whl"""

_BLOCK = re.compile(
    r"^(?:<!-- in the tests: (?P<trial>[^\n]+) -->\n)?```(?P<kind>sh|python)\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<shown>.*?)^```$)?",
    re.M | re.S,
)
_FILE = re.compile(r"# (\w+\.py)\n")
_FIGURE = re.compile(r"\d[\d.,\u2013%e+-]*")  # with the dash of an interval
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_LINK = re.compile(r"\[([^]]+)\]\(([^)\s:]+)\)")


@dataclass(frozen=True)
class Cell:
    """A piece of a tutorial: words, a command, Python, or a file to be written."""

    kind: str  # text, sh, python, file
    source: str
    line: int = 1
    trial: str | None = None
    shown: str | None = None

    @property
    def file(self) -> str:
        """The name of the file that the cell writes."""
        found = _FILE.match(self.source)
        assert found is not None
        return found[1]

    @property
    def tried(self) -> str:
        """The source as the tests run it."""
        if self.trial is None:
            return self.source
        if self.trial == "left out":
            return ""
        if self.kind == "sh":
            return "".join(f"{with_options(command, self.trial)}\n" for command in commands(self.source))
        text = self.source
        for change in self.trial.split("; "):
            old, new = change.split(" => ")
            if old not in text:
                raise ValueError(f"line {self.line}: there is no '{old}' to be replaced in the tests")
            text = text.replace(old, new)
        return text


def tutorials() -> list[Path]:
    """Return the pages that are tutorials, in the order of the site's navigation."""
    names = re.findall(r"tutorials/(\w+)\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return [PAGES / f"{name}.md" for name in names if name != "index"]


def cells_of(page: str) -> list[Cell]:
    """Return the cells of a page, in their order.

    Example:
        >>> page = "# A\\n\\n```sh\\nls\\n```\\n\\n```text\\na.png\\n```\\n"
        >>> [(cell.kind, cell.line, cell.shown) for cell in cells_of(page)]
        [('text', 1, None), ('sh', 4, 'a.png\\n')]
    """
    found, at = [], 0
    for block in _BLOCK.finditer(page):
        found.append(Cell("text", page[at : block.start()]))
        kind = "file" if block["kind"] == "python" and _FILE.match(block["code"]) else block["kind"]
        line = page[: block.start("code")].count("\n") + 1
        found.append(Cell(kind, block["code"], line, block["trial"], block["shown"]))
        at = block.end()
    found.append(Cell("text", page[at:]))
    return [cell for cell in found if cell.source.strip()]


def commands(block: str) -> list[str]:
    """Return the commands of a shell block, each on one line, without comments.

    Example:
        >>> commands("# first\\nrobustvlm attack tiny \\\\\\n    --limit 2   # a few\\nrobustvlm report runs\\n")
        ['robustvlm attack tiny --limit 2', 'robustvlm report runs']
    """
    lines = block.replace("\\\n", " ").splitlines()
    whole = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines)
    return [line for line in whole if line]


def with_options(command: str, options: str) -> str:
    """Return a command with other values of its options, and with those that it lacks.

    Example:
        >>> with_options("robustvlm attack tiny --limit 20", "--limit 2 --steps 1")
        'robustvlm attack tiny --limit 2 --steps 1'
    """
    words, changes = shlex.split(command), shlex.split(options)
    for name, value in zip(changes[::2], changes[1::2], strict=True):
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return shlex.join(words)


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a page, in format 4.5, without results; its first cell installs the package."""
    cells = cells_of(page)
    made = [_cell(number, cell) for number, cell in enumerate(cells, 1)]
    made.insert(0, {"cell_type": "code", "id": "install", "source": INSTALL, "metadata": {"tags": [SKIP]}} | _EMPTY)
    return {
        "cells": made,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


_EMPTY: dict[str, Any] = {"outputs": [], "execution_count": None}


def _cell(number: int, cell: Cell) -> dict[str, Any]:
    named: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
    if cell.kind == "text":
        # A notebook is read far from the pages that it names.
        words = _LINK.sub(lambda link: f"{link[1]} ({link[2].replace('../', 'docs/')})", cell.source)
        return named | {"cell_type": "markdown", "source": words.strip()}
    first = {"sh": "%%bash\n", "file": f"%%writefile {cell.file}\n" if cell.kind == "file" else "", "python": ""}
    return named | {"cell_type": "code", "source": (first[cell.kind] + cell.source).rstrip()} | _EMPTY


def execute(made: dict[str, Any], place: Path) -> tuple[dict[str, Any], str]:
    """Return a notebook with the results of its cells, run in a folder until one fails, and what that one said."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    whole = nbformat.from_dict(made)
    # Commands are those of this Python's environment, also where that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    failed = ""
    try:
        NotebookClient(whole, timeout=1800, resources={"metadata": {"path": str(place)}}).execute()
    except CellExecutionError as error:
        failed = str(error)
    return json.loads(nbformat.writes(whole)), failed


def output_of(cell: dict[str, Any]) -> str:
    """Return what a cell of an executed notebook has printed or returned, as text."""
    said = []
    for one in cell["outputs"]:
        if one["output_type"] == "stream" and one["name"] == "stdout":
            said.append("".join(one["text"]))
        elif one["output_type"] == "execute_result":
            said.append("".join(one["data"].get("text/plain", "")) + "\n")
    return _COLOUR.sub("", "".join(said))


def words_of(line: str) -> str:
    """Return a line without its figures and without what makes a table as wide as it is.

    Example:
        >>> words_of(" eps 2/255   right 2.5%   ─── ")
        'eps #/# right # ─'
    """
    return " ".join(re.sub("─+", "─", _FIGURE.sub("#", line)).split())


def refreshed(shown: str, got: str) -> str:
    """Return what a page shows with the figures of a run.

    Raises:
        ValueError: the run said other words, or in another order.

    Example:
        >>> refreshed("clean 80.0%\\n...\\nrobust 3%\\n", "clean 81%\\nlong\\ntable\\nrobust 2%\\n")
        'clean 81%\\n...\\nrobust 2%\\n'
    """
    lines, at, found = got.splitlines(), 0, []
    for line in shown.splitlines():
        if line.strip() in ("...", ""):
            found.append(line)
            continue
        same = (place for place in range(at, len(lines)) if words_of(lines[place]) == words_of(line))
        place = next(same, None)
        if place is None:
            near = difflib.get_close_matches(line, lines, 1, 0.4)
            raise ValueError(f"'{line.strip()}' is not said" + (f", but '{near[0].strip()}'" if near else ""))
        found.append(lines[place].rstrip())
        at = place + 1
    return "".join(f"{line}\n" for line in found)


def compare(page: str, done: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a page with the figures of its executed notebook, and what it shows that was not said."""
    faults = []
    for cell, ran in zip(cells_of(page), done["cells"][1:], strict=True):
        if cell.shown is None:
            continue
        try:
            page = page.replace(cell.shown, refreshed(cell.shown, output_of(ran)), 1)
        except ValueError as error:
            faults.append(f"line {cell.line}: {error}")
    return page, faults


def main(arguments: Iterable[str] | None = None) -> None:
    """Make the notebooks; run and compare them where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tutorials, as attack [default: all]")
    parser.add_argument("--run", action="store_true", help="execute them and compare what the pages show")
    parser.add_argument("--refresh", action="store_true", help="write the figures of the run into the pages")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    for path in tutorials():
        if given.names and path.stem not in given.names:
            continue
        text = path.read_text(encoding="utf-8")
        made = notebook(text)
        if given.run:
            print(f"{path.stem} ...", flush=True)
            with tempfile.TemporaryDirectory() as place:
                made, failed = execute(made, Path(place))
            new, wrong = (text, [failed]) if failed else compare(text, made)
            faults += [f"{path.relative_to(ROOT)}, {fault}" for fault in wrong]
            if given.refresh:
                path.write_text(new, encoding="utf-8")
        (given.out / f"{path.stem}.ipynb").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()

"""The tutorials run as they stand, on less; their notebooks hold all that the pages hold."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustvlm.cli.main import main
from tools.tutorials import SKIP, Cell, cells_of, commands, compare, notebook, tutorials
from tools.tutorials import main as make

NAMES = [page.stem for page in tutorials()]


def page_of(name: str) -> str:
    (path,) = (page for page in tutorials() if page.stem == name)
    return path.read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder; modules that an earlier tutorial has left are forgotten."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("my_model", "my_defence"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def run(cell: Cell, known: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a cell in this process."""
    if cell.kind == "file":
        Path(cell.file).write_text(cell.tried, encoding="utf-8")
    elif cell.kind == "python":
        exec(compile("\n" * (cell.line - 1) + cell.tried, "tutorial", "exec"), known)
    elif cell.kind == "sh":
        for command in commands(cell.tried):
            program, *words = shlex.split(command)
            assert program == "robustvlm"
            monkeypatch.setattr(sys, "argv", [program, *words])
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code, command


@pytest.mark.parametrize("name", NAMES)
def test_the_tutorial_runs_on_less(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del place
    known: dict[str, object] = {"__name__": "__main__"}
    for cell in cells_of(page_of(name)):
        try:
            run(cell, known, monkeypatch)
        except (Exception, SystemExit):
            pytest.fail(f"{name}.md, line {cell.line}:\n{traceback.format_exc()}")


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_holds_what_the_page_holds(name: str) -> None:
    cells = cells_of(page_of(name))
    made = notebook(page_of(name))
    install, *rest = made["cells"]
    assert install["metadata"]["tags"] == [SKIP]
    assert "pip install" in install["source"]
    assert len(rest) == len(cells)
    assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
    for cell, one in zip(cells, rest, strict=True):
        assert (one["cell_type"] == "markdown") == (cell.kind == "text")
        if cell.kind != "text":
            assert one["source"].endswith(cell.source.rstrip())
    everything = json.dumps(made)
    assert "in the tests" not in everything
    assert "](" not in "".join(one["source"] for one in rest if one["cell_type"] == "markdown")


def test_every_block_is_taken_and_shows_what_came_out() -> None:
    assert NAMES == ["attack", "certify", "harden", "refuse", "judge"]
    for name in NAMES:
        page, cells = page_of(name), cells_of(page_of(name))
        assert sum(cell.kind != "text" for cell in cells) == page.count("```sh\n") + page.count("```python\n"), name
        assert sum(cell.shown is not None for cell in cells) == page.count("```text\n") >= 3, name
        assert all(cell.kind != "text" or "```" not in cell.source for cell in cells), name


SAID = "# A\n\n```sh\nrobustvlm x\n```\n\n```text\nright 90.0%  68.3 to 98.8%\n...\nReport: here\n```\n"


@pytest.mark.parametrize(
    ("output", "faults"),
    [
        ("right 5%  1 to 9%\nmore\nReport: here\n", []),
        ("wrong 90.0%  68.3 to 98.8%\nReport: here\n", ["line 4: 'right 90.0%  68.3 to 98.8%' is not said"]),
        ("Report: here\nright 90.0%  68.3 to 98.8%\n", ["line 4: 'Report: here' is not said"]),
    ],
)
def test_shown_words_are_compared_and_figures_taken_over(output: str, faults: list[str]) -> None:
    done = notebook(SAID)
    done["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": output}]
    page, found = compare(SAID, done)
    assert [fault.split(", but")[0] for fault in found] == faults
    assert page == (SAID if faults else SAID.replace("right 90.0%  68.3 to 98.8%", "right 5%  1 to 9%"))


def test_a_change_for_the_tests_that_changes_nothing_is_found() -> None:
    with pytest.raises(ValueError, match="there is no 'limit=9'"):
        Cell("python", "f(limit=4)\n", trial="limit=9 => limit=1").tried  # noqa: B018


def test_notebooks_are_written(tmp_path: Path) -> None:
    make(["attack", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat"] == 4

"""Every Python block of README and docs runs as it stands, one after another; no command in them is out of date."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from robustvlm.cli.main import app

ROOT = Path(__file__).parents[1]
# Each example of extend.md is a module, a command and a use of it: test_extend.py runs them.
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "extend.md")]

# A block of something that a reader has and a test has not says so, and why, on the line before it.
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """The line, the code and, if it is not run, the reason of every block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: at.start("code")].count("\n") + 1, at["code"], at["why"]) for at in _BLOCK.finditer(text)]


def test_no_block_is_overlooked() -> None:
    for page in PAGES:
        assert len(blocks(page)) == page.read_text(encoding="utf-8").count("```python"), page.name
    run = [page.name for page in PAGES for *_, why in blocks(page) if why is None]
    assert {"README.md", "python.md", "attacks.md", "detect.md", "models.md"} <= set(run)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(why is None for *_, why in blocks(page))], ids=lambda page: page.name
)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {"__name__": "__main__"}
    for line, code, why in blocks(page):
        if why is not None:
            continue
        try:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), known)
        except Exception:
            pytest.fail(f"{page.name}, the block of line {line}:\n{traceback.format_exc()}")


PROGRAM: Any = typer.main.get_command(app)
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN += sorted((ROOT / "benchmarks").rglob("*.md"))
_SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```$", re.M | re.S)
_WITHOUT = ("--version", "--help", "--install-completion", "COMMAND")


def commands_of(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the words of every command of this program, but for its name, and whether they are all of it.

    Commands are whole in shell blocks; between backticks they may end before a value.
    """
    blocks = "".join(_SHELL.findall(text)).replace("\\\n", " ")
    spans = re.findall(r"`(robustvlm [^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    for lines, whole in ((blocks.splitlines(), True), (spans, False)):
        for line in lines:
            parts = shlex.shlex(line, posix=True, punctuation_chars=True)
            parts.whitespace_split = True
            words: list[str] = []
            for word in [*parts, ";"]:
                if not set(word) <= set(";|&<>()"):
                    words.append(word)
                elif "robustvlm" in words:
                    yield words[words.index("robustvlm") + 1 :], whole
                    words = []


def test_commands_are_found() -> None:
    lines = "robustvlm attack tiny \\\n    --fail-if 'asr>0.5'   # gate\nls; python -m robustvlm report a b > c\n"
    shell = f"```sh\n{lines}```\n"
    assert list(commands_of(f"`robustvlm data x --limit` and\n{shell}")) == [
        (["attack", "tiny", "--fail-if", "asr>0.5"], True),
        (["report", "a", "b"], True),
        (["data", "x", "--limit"], False),
    ]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_command_is_out_of_date(page: Path) -> None:
    for (name, *words), whole in commands_of(page.read_text(encoding="utf-8")):
        if name in _WITHOUT or any(word in ("...", "…") or word[0] in "$[" for word in words):
            continue
        assert name in PROGRAM.commands, f"{page.name}: {name}"
        try:
            PROGRAM.commands[name].make_context(name, list(words))
        except Exception as error:
            if whole or "No such option" in str(error):
                pytest.fail(f"{page.name}: robustvlm {shlex.join([name, *words])}: {error}")

"""Every Python block of README and docs runs as it stands; blocks of one page go on from each other."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest

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

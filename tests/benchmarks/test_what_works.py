"""docs/what-works.md says only what the tables have: every figure stands in a page that its lines link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "what-works.md"
_FIGURE = re.compile(r"(?<![\d/:.])\d*\.\d+")
_LINK = re.compile(r"\]\(([^)#]+\.md)\)")


def parts() -> list[str]:
    """Bullets and paragraphs of the page, as one line each."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.split(r"\n\n|\n(?=\* )", text)
    return [" ".join(part.split()) for part in found if not part.startswith("#")]


def figures(text: str) -> set[str]:
    """Figures with a decimal point, without a leading zero; what stands in code is none."""
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
    return {figure.lstrip("0") for figure in _FIGURE.findall(plain)}


@pytest.mark.parametrize("part", [part for part in parts() if figures(part)], ids=lambda part: part[:40])
def test_every_figure_stands_where_its_line_points_to(part: str) -> None:
    pages = [(PAGE.parent / link).resolve() for link in _LINK.findall(part)]
    assert pages, "figures without a link"
    there = set().union(*(figures(page.read_text(encoding="utf-8")) for page in pages))
    # A table may have a digit more or fewer zeros behind: 46.0% and 46 %, .07 and .070.
    there |= {figure.rstrip("0") for figure in there}
    missing = {figure for figure in figures(part) if figure not in there and figure.rstrip("0") not in there}
    assert not missing, missing


def test_it_speaks_of_every_benchmark_of_a_defence() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in ("finetune", "purify", "immunity", "zoo", "mllm", "detect", "photowords"):
        assert f"(../benchmarks/{name}/README.md)" in text

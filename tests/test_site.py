"""The docs site without mkdocs: its navigation names every page, links lead somewhere, its figures are the measured."""

from __future__ import annotations

import doctest
import posixpath
import re
from types import ModuleType
from typing import Any

import pytest
import yaml

import robustvlm as rv
from tools import site_pages, tutorials
from tools.site_pages import ROOT, in_repository, in_site, linked, links_of, outside

DOCS = ROOT / "docs"
OWN = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
OTHERS = [name for name in outside() if name.endswith(".md")]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
_CODE = re.compile(r"^(```+).*?^\1$", re.M | re.S)
_TICKS = re.compile(r"`[^`\n]*`")


def named(nav: Any) -> list[str]:
    """Return the pages of a navigation, in their order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in named(part)]


def prose(name: str) -> str:
    """Return a page, given by its path from the root, without code."""
    return _TICKS.sub("", _CODE.sub("", (ROOT / name).read_text(encoding="utf-8")))


def anchors(name: str) -> set[str]:
    """Return the addresses of a page's headings, as the site and GitHub make them."""
    text = _CODE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add("#" + re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip()))
    return found


def test_the_navigation_names_every_page_once_and_no_other() -> None:
    assert sorted(named(CONFIG["nav"])) == sorted([*OWN, *OTHERS])


@pytest.mark.parametrize("name", ["README.md", *OTHERS, *(f"docs/{page}" for page in OWN)])
def test_links_resolve(name: str) -> None:
    for path, anchor in links_of(prose(name)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        assert (ROOT / target).exists(), f"{name}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{name}: {path}{anchor}"
    for anchor in re.findall(r"\]\((#[^)\s]+)\)", prose(name)):
        assert anchor in anchors(name), f"{name}: {anchor}"


@pytest.mark.parametrize("page", [*OWN, *OTHERS])
def test_links_of_the_site_lead_to_what_is_in_it(page: str) -> None:
    there = {*OWN, *outside(), *(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.png"))}
    assert in_site(in_repository(page)) == page
    for path, _ in links_of(
        _TICKS.sub("", _CODE.sub("", linked((ROOT / in_repository(page)).read_text("utf-8"), page)))
    ):
        assert posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) in there, f"{page}: {path}"


def test_the_reference_has_every_public_name_once() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    told = re.findall(r"^::: robustvlm\.(\w+)$", text, re.M) + re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted(told) == sorted(name for name in rv.__all__ if name != "__version__")


def rows(text: str, columns: int) -> list[list[str]]:
    """Return the rows of a page's tables of so many columns, without their heads."""
    found = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in found if len(row) == columns and not set(row[1]) <= set("- ")]


def percent(cell: str) -> float:
    """Return the first share of a cell."""
    found = re.match(r"([\d.]+) ?%", cell)
    assert found is not None, cell
    return float(found[1])


MEASURED_AS = {
    "none": "none (20 steps, 100 queries)",
    "Gaussian blur": "`+blur:3`",
    "vote of 8 random crops": "`+vote:8`",
}


def test_the_table_of_the_start_page_is_the_benchmarks() -> None:
    measured = (ROOT / "benchmarks/zoo/README.md").read_text(encoding="utf-8")
    section = measured.partition("### tiny, L∞ 4/255")[2].partition("\n### ")[0]
    known = {row[0]: row for row in rows(section, 9)}
    shown = [row for row in rows((DOCS / "index.md").read_text(encoding="utf-8"), 6) if row[0] != "defence"]
    assert len(shown) >= 7
    for name, clean, unaware, through, worst, cost in shown:
        plain = re.sub(r"\[(\w+)\].*", r"\1", name)
        row = known[MEASURED_AS.get(plain, f"`+{plain.lower()}`")]
        assert percent(clean) == percent(row[1]), name
        assert percent(unaware) == min(percent(row[2]), percent(row[3])), name
        assert percent(through) == percent(row[5]), name
        assert worst == row[6].replace("%", " %", 1).replace("%)", ")").replace(".0 %", " %"), name
        assert cost == row[8].replace(" / 0", "").replace(" / ", " + ") + (
            " backward" if "/ 0" not in row[8] else ""
        ), name


@pytest.mark.parametrize("module", [site_pages, tutorials])
def test_the_examples_of_the_tools_are_right(module: ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed


def test_no_page_asks_another_server() -> None:
    assert CONFIG["theme"]["font"] is False
    assert not [
        address for key in ("extra_css", "extra_javascript") for address in CONFIG.get(key, ()) if "//" in address
    ]
    assert "http" not in re.sub(
        r"http://www\.w3\.org/\S+", "", "".join(p.read_text() for p in (DOCS / "assets").glob("*.*"))
    )

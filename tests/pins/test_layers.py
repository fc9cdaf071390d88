"""Imports go down: a part of the package knows those below it, and no two modules know each other.

What is wrong today is listed, and the lists may only shrink: an entry that is not needed any more fails too.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from pathlib import Path

import robustvlm

ORDER = (
    "text",
    "errors",
    "stats",
    "core",
    "attacks",
    "certify",
    "llm",
    "runs",
    "models",
    "data",
    "detect",
    "training",
    "defenses",
    "report",
    "commands",
    "cli",
)
"""The first name below the package, from the bottom to the top."""

UPWARDS: dict[tuple[str, str], int] = {}
"""How often modules of a part import from a part above their own."""

CIRCLES: dict[tuple[str, ...], int] = {}
"""How many sets of modules there are that know each other, over others or not, by the parts that they are in; faces of
packages (`__init__`) are left out."""

ROOT = Path(robustvlm.__file__).parent
TOP = ROOT.name
FILES = {
    ".".join((TOP, *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p for p in ROOT.rglob("*.py")
}
_FACES = {module for module, path in FILES.items() if path.name == "__init__.py"}


def _imports() -> dict[str, set[str]]:
    """Return the modules of the package that each imports, in functions and for type checkers too."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == TOP:
                assert node.level == 0
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                found[module] |= {name if name in FILES else str(node.module) for name in names}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.split(".")[0] == TOP}
    return found


IMPORTS = _imports()


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_its_place() -> None:
    assert {_part(module) for module in FILES} - {"", "__main__"} <= set(ORDER)


def test_imports_go_down() -> None:
    place = {part: number for number, part in enumerate(ORDER)}
    found = {
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if _part(module) in place and place.get(_part(other), -1) > place[_part(module)]
    }
    counted = Counter((_part(module), _part(other)) for module, other in found)
    assert counted == UPWARDS, f"more is wrong, less is to be taken down in UPWARDS: {sorted(found)}"


def test_no_two_modules_know_each_other() -> None:
    found = _circles()
    counted = Counter(tuple(sorted({_part(module) for module in circle})) for circle in found)
    assert counted == CIRCLES, f"more is wrong, less is to be taken down in CIRCLES: {[sorted(one) for one in found]}"


def _circles() -> list[set[str]]:
    """Return the sets of more than one module that all reach each other."""
    known = {m: {o for o in IMPORTS[m] if o in FILES and o not in _FACES} - {m} for m in FILES if m not in _FACES}
    reached = {module: _reached(module, known) for module in known}
    circles: list[set[str]] = []
    for module, others in reached.items():
        circle = {module, *(other for other in others if module in reached[other])}
        if len(circle) > 1 and circle not in circles:
            circles.append(circle)
    return circles


def _reached(module: str, known: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = known[waiting.pop()] - found
        found |= new
        waiting += new
    return found

"""What `make test-matrix` installs is what pyproject promises, and every CPU gets the tests that it can run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def floors(lines: list[str], sign: str) -> dict[str, str]:
    """Return the version behind `sign` of every requirement that has one."""
    pattern = re.compile(rf"([A-Za-z0-9_-]+)(?:\[.*\])?{sign}([0-9.]+)")
    return {found[1].lower().replace("-", "_"): found[2] for line in lines if (found := pattern.match(line))}


def test_the_oldest_releases_are_the_floors_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    # Of what is optional, what opens models and data: the newest releases refuse the oldest torch and numpy.
    optional = [
        found
        for extra in re.findall(r"^(?:external|hub|wds) = \[(.*?)\]", text, re.MULTILINE)
        for found in re.findall(r'"(.*?)"', extra)
    ]
    promised = floors([*re.findall(r'"(.*?)"', section[1]), *optional], ">=")
    pinned = floors((ROOT / "tools/matrix/oldest.txt").read_text().splitlines(), "==")
    assert {"torch", "torchvision", "open_clip_torch", "typer", "pydantic", "numpy", "pyarrow"} <= promised.keys()
    assert promised.keys() == pinned.keys()
    for name, version in promised.items():
        released = pinned[name]
        assert released == version or set(released.removeprefix(version)) <= {".", "0"}, name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(set(), ["default"]), ({"avx2"}, ["default", "avx2"]), ({"avx2", "avx512f"}, ["default", "avx2", "avx512"])],
)
def test_a_cpu_is_told_to_use_what_it_has(flags: set[str], expected: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("equality", ROOT / "tools/matrix/equality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.available(flags) == expected

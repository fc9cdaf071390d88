"""What `make packaging` finds wrong with archives and metadata."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.packaging import EXTRAS, SDIST_HAS, metadata_faults, sdist_faults, wheel_faults

ROOT = Path(__file__).parents[2]
GOOD = [
    "robustvlm/__init__.pyi",
    "robustvlm/py.typed",
    "robustvlm/report/report.schema.json",
    "robustvlm-1.data/data/share/doc/robustvlm/attacks.md",
    "robustvlm-1.dist-info/licenses/LICENSE",
]
METADATA = """\
Metadata-Version: 2.4
Name: robustvlm
Summary: Attack, certify and defend
License-Expression: Apache-2.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.3
Requires-Dist: torchattacks>=3.5.1; extra == 'external'
"""
PROVIDED = "".join(f"Provides-Extra: {extra}\n" for extra in EXTRAS.split(","))


def test_a_whole_wheel_has_no_fault() -> None:
    assert wheel_faults(GOOD) == []


@pytest.mark.parametrize("stray", ["tests/test_a.py", "tools/__init__.py", "benchmarks/run.py"])
def test_a_folder_beside_the_package_is_found(stray: str) -> None:
    (said,) = wheel_faults([*GOOD, stray])
    assert f"{stray.split('/')[0]}/" in said


@pytest.mark.parametrize("lost", GOOD)
def test_what_a_wheel_lacks_is_found(lost: str) -> None:
    assert len(wheel_faults([name for name in GOOD if name != lost])) == 1


def test_what_a_sdist_lacks_is_found_and_what_is_asked_for_exists() -> None:
    whole = [f"robustvlm-1/{name}" for name in SDIST_HAS]
    assert sdist_faults(whole) == []
    assert sdist_faults(whole[1:]) == [f"{SDIST_HAS[0]} is missing"]
    assert [name for name in SDIST_HAS if not (ROOT / name).is_file()] == []


def test_metadata_that_lack_something_or_pin_others_are_found() -> None:
    assert metadata_faults(METADATA + PROVIDED) == []
    assert metadata_faults(METADATA) == [f"there is no extra {extra}" for extra in EXTRAS.split(",")]
    assert "License-Expression" in metadata_faults(METADATA.replace("License-E", "E") + PROVIDED)[0]
    (said,) = metadata_faults(METADATA + "Requires-Dist: torchattacks>=3.5.1\n" + PROVIDED)
    assert "pins others" in said


def test_the_extras_are_those_of_the_project_but_for_tests_and_docs() -> None:
    section = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    named = re.findall(r"^(\w+) = \[", section.partition("\n[project.scripts]")[0], re.M)
    assert set(named) - {"test", "docs"} == set(EXTRAS.split(","))


def test_the_program_needs_nothing_but_python_to_tell_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tools.packaging", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--no-install" in done.stdout

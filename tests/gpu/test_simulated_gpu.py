"""The program on a simulated GPU: it runs, comes to what it comes to on the CPU, and rarely makes the host wait.

One process of its own does it all (everything.py), as the simulation patches torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

# Every command twice: minutes on a machine that has other work.
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PINS = HERE.parent / "pins"
INPUTS = ("*.parquet", "*.txt", "model")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs: cpu/NAME and cuda:0/NAME."""
    folder = tmp_path_factory.mktemp("gpu")
    for path in (path for pattern in INPUTS for path in (PINS / "before").glob(pattern)):
        shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder)
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE, PINS)))
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "everything.py"), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "log.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    return json.loads((place / "report.json").read_text())


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_command_ends_well(report: dict[str, Any], place: Path, device: str) -> None:
    failed = {name: code for name, code in report[device]["ended"].items() if code}
    failed |= {name: said for name, said in report[device]["said"].items() if said[0]}
    assert not failed, (failed, [line for line in (place / "log.txt").read_text().splitlines() if "rror" in line])
    assert "failed" not in report[device]["library"], report[device]["library"]["failed"]


def test_rows_are_those_of_the_cpu(place: Path) -> None:
    compared = 0
    for ours in sorted((place / "cpu").glob("*/results.parquet")):
        theirs = place / "cuda:0" / ours.parent.name / ours.name
        rows = [_ordered(pq.read_table(path).to_pylist()) for path in (ours, theirs)]
        assert len(rows[0]) == len(rows[1])
        assert [said for pair in zip(*rows, strict=True) for said in _apart(*pair)] == [], ours.parent.name
        compared += len(rows[0])
    assert compared > 100


def test_answers_are_those_of_the_cpu(report: dict[str, Any]) -> None:
    ours, theirs = ({key: report[device][key] for key in ("said", "library")} for device in ("cpu", "cuda:0"))
    assert _apart(ours, theirs) == []


def test_attacks_wait_twice_a_pass_at_most(report: dict[str, Any]) -> None:
    """Once for what a pass shows, once more where sub-runs end; the proposals of most attacks wait for nothing."""
    for name, passes in report["waits"]["fp32"].items():
        assert len(passes) > 5
        worst = max(passes, key=lambda one: sum(one["engine"].values()))
        assert sum(worst["engine"].values()) <= 2, (name, worst)
        # FAB asks whether its projection has settled, for both norms; APGD-T besides whether any lane still walks.
        asked = {"fab-t": 4, "apgd-t": 5}.get(name.partition(":")[0], 0)
        curious = max(passes, key=lambda one: sum(one["attack"].values()))
        assert sum(curious["attack"].values()) <= asked, (name, curious)
        quiet = [one for one in passes if not one["ended"]]
        assert min(sum(one["engine"].values()) for one in quiet) == 1, name


def test_what_is_not_final_costs_one_question_and_its_own_look(report: dict[str, Any]) -> None:
    for name, passes in report["waits"]["bf16"].items():
        worst = max(passes, key=lambda one: sum(one["engine"].values()))
        # The second look at points that end a sub-run is a pass of its own, with an answer to fetch.
        assert sum(worst["engine"].values()) <= 4, (name, worst)


def test_certification_waits_once_a_pass(report: dict[str, Any]) -> None:
    found = report["waits"]["certify"]
    assert found["passes"] > 5
    assert sum(found["waits"].values()) <= found["passes"], found


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = [key for key in ("image_id", "id", "attack", "eps", "norm", "goal") if rows and key in rows[0]]
    return sorted(rows, key=lambda row: [str(row[key]) for key in keys])


# How many rows ride ahead depends on when answers come in, and weights that were trained differ in their last digits.
_FREE = ("device", "adversarial", "passes", "model_fingerprint")


def _apart(one: Any, other: Any, where: str = "") -> list[str]:
    """Return what differs beyond rounding, times and names of devices aside."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in one.keys() | other.keys() if "seconds" not in key and key not in _FREE}
        return [said for key in sorted(keys) for said in _apart(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [said for n, pair in enumerate(zip(one, other, strict=True)) for said in _apart(*pair, f"{where}[{n}]")]
    if isinstance(one, float) and isinstance(other, float):
        close = one == other or abs(one - other) <= CLOSE * max(1, abs(one)) or (one != one and other != other)
        return [] if close else [f"{where}: {one} and {other}"]
    if isinstance(one, str) and isinstance(other, str) and one[:1] == other[:1] == "{":
        return _apart(json.loads(one), json.loads(other), where)
    return [] if one == other else [f"{where}: {str(one)[:80]} and {str(other)[:80]}"]

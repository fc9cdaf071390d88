"""Runs the commands on the CPU and on the simulated GPU, in a process of its own, and compares what comes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).parent
PINS = HERE.parent / "pins"
INPUTS = ("*.parquet", "*.txt", "model")
CLOSE = 1e-5


def run_on_both(folder: Path, *words: str) -> Path:
    """Fill a folder with runs, cpu/NAME and cuda:0/NAME, and report.json; `words` are for everything.py."""
    for path in (path for pattern in INPUTS for path in (PINS / "before").glob(pattern)):
        shutil.copytree(path, folder / path.name) if path.is_dir() else shutil.copy(path, folder)
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE, PINS)))
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(HERE / "everything.py"), str(folder), *words]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "log.txt").write_text(done.stderr)
    return folder


def report_of(place: Path) -> dict[str, Any]:
    """Return how the runs of a folder ended."""
    found: dict[str, Any] = json.loads((place / "report.json").read_text())
    return found


def require_same_rows(place: Path) -> int:
    """Compare the result rows of all runs of the two devices; return how many there were."""
    compared = 0
    for ours in sorted((place / "cpu").glob("*/results.parquet")):
        theirs = place / "cuda:0" / ours.parent.name / ours.name
        rows = [ordered(pq.read_table(path).to_pylist()) for path in (ours, theirs)]
        assert len(rows[0]) == len(rows[1])
        assert [said for pair in zip(*rows, strict=True) for said in apart(*pair)] == [], ours.parent.name
        compared += len(rows[0])
    return compared


def require_few_waits(passes: list[dict[str, Any]], name: str, *, asked: int = 0) -> None:
    """Assert that the engine waited at most twice a pass, once where no sub-run ended, and its attack so often."""
    assert len(passes) > 5
    worst = max(passes, key=lambda one: sum(one["engine"].values()))
    assert sum(worst["engine"].values()) <= 2, (name, worst)
    curious = max(passes, key=lambda one: sum(one["attack"].values()))
    assert sum(curious["attack"].values()) <= asked, (name, curious)
    quiet = [one for one in passes if not one["ended"]]
    assert min(sum(one["engine"].values()) for one in quiet) == 1, name


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of results in one order, whatever order they came in."""
    keys = [key for key in ("image_id", "id", "attack", "eps", "norm", "goal") if rows and key in rows[0]]
    return sorted(rows, key=lambda row: [str(row[key]) for key in keys])


# How many rows ride ahead depends on when answers come in, and weights that were trained differ in their last digits.
_FREE = ("device", "adversarial", "passes", "model_fingerprint")


def apart(one: Any, other: Any, where: str = "") -> list[str]:
    """Return what differs beyond rounding, times and names of devices aside."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in one.keys() | other.keys() if "seconds" not in key and key not in _FREE}
        return [said for key in sorted(keys) for said in apart(one.get(key), other.get(key), f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [said for n, pair in enumerate(zip(one, other, strict=True)) for said in apart(*pair, f"{where}[{n}]")]
    if isinstance(one, float) and isinstance(other, float):
        close = one == other or abs(one - other) <= CLOSE * max(1, abs(one)) or (one != one and other != other)
        return [] if close else [f"{where}: {one} and {other}"]
    if isinstance(one, str) and isinstance(other, str) and one[:1] == other[:1] == "{":
        return apart(json.loads(one), json.loads(other), where)
    return [] if one == other else [f"{where}: {str(one)[:80]} and {str(other)[:80]}"]

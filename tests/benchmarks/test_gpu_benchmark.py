"""The measurement for a GPU, on the bundled model and the CPU: every figure is there, and float32 is nearly float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_runs_and_says_everything(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert done.stdout.count("\n| ") == len(figures) + 1
    assert json.loads(done.stdout.splitlines()[-1])["figures"] == figures
    words = [figure for figure in figures if isinstance(figure["value"], str) and " of " not in figure["value"]]
    assert words == []
    found = {(figure["what"], figure["path"]): figure for figure in figures}
    assert 0 < found["relative error of gradients", "fp32"]["value"] < 1e-3
    assert found["relative error of gradients", "fp32"]["value"] < found["relative error of gradients", "bf16"]["value"]
    for path in ("fp32", "bf16"):
        for engine in ("attack", "certification"):
            assert 0 < found[f"rows/s, {engine} engine", path]["share"] < 2
    same = [figure["value"] for figure in figures if figure["what"] == "same outcomes as float64"]
    assert len(same) == 5
    assert all(int(value.split()[0]) >= 3 for value in same)

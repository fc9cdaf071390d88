"""When the first image goes through a network, nothing is loaded that a run needs at its end, if at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.start import COMMANDS


# Of the others, certify and detect have the largest homes; all five are in the benchmark.
@pytest.mark.parametrize("name", ["attack", "detect"])
def test_nothing_that_can_wait_is_loaded_before_the_first_pass(name: str, tmp_path: Path) -> None:
    command = [*COMMANDS[name], "--out", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.start", "--until-first-pass", *command],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, *loaded = done.stdout.splitlines()[-1].split()
    assert float(seconds) > 0
    assert loaded == []

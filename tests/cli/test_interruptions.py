"""Real processes, real signals: a killed run goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Call, environment
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("own_place")

EMOJI = ["attack", "--attack", "pgd:steps=10", "--eps", "1/255", "--limit", "16", "--lanes", "8", "--device", "cpu"]
EMOJI += ["--checks", "quick"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "robustvlm", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_lines(process: subprocess.Popen[str], journal: Path, count: int) -> None:
    """Return as soon as the journal has `count` lines."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"no {count} lines: {process.communicate()}")


def rows_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "results.parquet").drop_columns(["seconds"])


@pytest.fixture
def straight(call: Call, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run on the bundled model and data."""
    assert call(*EMOJI, "--name", "straight").code == 0
    return tmp_path / "runs" / "straight"


@pytest.mark.equality
def test_killed_and_repeated_a_run_ends_as_if_nothing_had_happened(call: Call, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "killed"
    lines = random.randrange(1, 30)
    process = start(*EMOJI, "--name", "killed")
    wait_for_lines(process, folder / "journal.jsonl", lines)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "results.parquet").exists()
    assert call(*EMOJI, "--name", "killed").code == 0
    assert rows_of(folder).equals(rows_of(straight)), f"killed after {lines} lines"
    shown = [{path.name: load_file(path) for path in (run / "gallery").iterdir()} for run in (folder, straight)]
    assert shown[0].keys() == shown[1].keys()
    for name, tensors in shown[0].items():
        assert all(tensors[key].equal(shown[1][name][key]) for key in ("clean", "adversarial"))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_a_run_says_how_to_go_on(call: Call, tmp_path: Path, signal_number: signal.Signals) -> None:
    process = start(*EMOJI, "--name", "stopped")
    wait_for_lines(process, tmp_path / "runs" / "stopped" / "journal.jsonl", 20)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped; everything so far is kept in ")
    assert "repeat the command to go on" in err
    assert "Traceback" not in err
    if signal_number == signal.SIGINT:
        assert call(*EMOJI, "--name", "stopped", "--resume").code == 0

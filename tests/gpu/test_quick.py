"""An attack and a certificate on a simulated GPU: the rows of the CPU, and few waits of the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparing import report_of, require_few_waits, require_same_rows, run_on_both


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs: cpu/NAME and cuda:0/NAME."""
    return run_on_both(tmp_path_factory.mktemp("gpu"), "quick")


def test_rows_are_those_of_the_cpu(place: Path) -> None:
    report = report_of(place)
    for device in ("cpu", "cuda:0"):
        assert not any(report[device]["ended"].values()), (place / "log.txt").read_text()[-3000:]
    assert require_same_rows(place) == 2 * 6 + 6


def test_the_host_waits_at_most_twice_a_pass_of_attacks_and_once_of_certificates(place: Path) -> None:
    waits = report_of(place)["waits"]
    assert len(waits["fp32"]) == 2
    for name, passes in waits["fp32"].items():
        require_few_waits(passes, name)
    assert waits["certify"]["passes"] > 5
    assert sum(waits["certify"]["waits"].values()) <= waits["certify"]["passes"], waits["certify"]

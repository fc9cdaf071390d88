"""The program on a simulated GPU: it runs, comes to what it comes to on the CPU, and rarely makes the host wait.

One process of its own does it all (everything.py), as the simulation patches torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import apart, report_of, require_few_waits, require_same_rows, run_on_both

# Every command twice: minutes on a machine that has other work. `test_quick.py` is always run.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs: cpu/NAME and cuda:0/NAME."""
    return run_on_both(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def report(place: Path) -> dict[str, Any]:
    return report_of(place)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_command_ends_well(report: dict[str, Any], place: Path, device: str) -> None:
    failed = {name: code for name, code in report[device]["ended"].items() if code}
    failed |= {name: said for name, said in report[device]["said"].items() if said[0]}
    assert not failed, (failed, [line for line in (place / "log.txt").read_text().splitlines() if "rror" in line])
    assert "failed" not in report[device]["library"], report[device]["library"]["failed"]


def test_rows_are_those_of_the_cpu(place: Path) -> None:
    assert require_same_rows(place) > 100


def test_answers_are_those_of_the_cpu(report: dict[str, Any]) -> None:
    ours, theirs = ({key: report[device][key] for key in ("said", "library")} for device in ("cpu", "cuda:0"))
    assert apart(ours, theirs) == []


def test_attacks_wait_twice_a_pass_at_most(report: dict[str, Any]) -> None:
    """Once for what a pass shows, once more where sub-runs end; the proposals of most attacks wait for nothing."""
    for name, passes in report["waits"]["fp32"].items():
        # FAB asks whether its projection has settled, for both norms; APGD-T besides whether any lane still walks.
        require_few_waits(passes, name, asked={"fab-t": 4, "apgd-t": 5}.get(name.partition(":")[0], 0))


def test_what_is_not_final_costs_one_question_and_its_own_look(report: dict[str, Any]) -> None:
    for name, passes in report["waits"]["bf16"].items():
        worst = max(passes, key=lambda one: sum(one["engine"].values()))
        # The second look at points that end a sub-run is a pass of its own, with an answer to fetch.
        assert sum(worst["engine"].values()) <= 4, (name, worst)


def test_certification_waits_once_a_pass(report: dict[str, Any]) -> None:
    found = report["waits"]["certify"]
    assert found["passes"] > 5
    assert sum(found["waits"].values()) <= found["passes"], found

"""A run that stopped early shows bounds instead of rates, and says what to do; forecasts are shown where costs are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pages import terminal

from robustvlm.commands.attack.record import load_run, robust_bounds, success_bounds, verdict
from robustvlm.commands.attack.report import write_report
from robustvlm.commands.attack.summary import Summary
from robustvlm.report.words import RANGE, forecast
from robustvlm.runs.records import Estimate
from robustvlm.stats import rate

WriteRun = Callable[..., Path]
COST = Estimate(images=90, passes_least=180, passes_most=7560, seconds_least=1.5, seconds_most=63, unknown=["x:y"])


@pytest.fixture
def stopped(write_run: WriteRun, tmp_path: Path) -> tuple[Path, Summary]:
    """A run of 100 images whose budget ended when 40 were fooled, 10 known robust and 30 undecided."""
    folder = write_run(tmp_path / "run", images=100, n_classes=10, eps=1)
    summary = load_run(folder).summary
    (at,) = summary.per_eps
    at = at.model_copy(
        update={
            "fooled": 40,
            "robust": 10,
            "undecided": 30,
            "robust_accuracy": rate(10, 100),
            "robust_accuracy_at_most": rate(40, 100),
            "attack_success_rate": rate(40, 50),
        }
    )
    reason = "the budget of 900passes was spent in pgd Linf 0.5/255"
    summary = summary.model_copy(update={"per_eps": [at], "unfinished": reason, "estimate": COST})
    (folder / "summary.json").write_text(summary.model_dump_json(), encoding="utf-8")
    return folder, summary


def test_the_terminal_shows_bounds_and_no_rate_of_a_class(stopped: tuple[Path, Summary]) -> None:
    shown = terminal(load_run(stopped[0]), 200)
    assert f"10.0% {RANGE} 40.0%" in shown
    assert f"50.0% {RANGE} 87.5%" in shown
    assert "By class" not in shown
    assert "80.0%" not in shown, "the share of the images that were decided is no success rate"
    assert verdict(stopped[1]) in " ".join(shown.split())


def test_the_sentence_names_reason_bounds_and_remedy(stopped: tuple[Path, Summary]) -> None:
    assert verdict(stopped[1]) == (
        "Stopped early: the budget of 900passes was spent in pgd Linf 0.5/255. 30 of 100 images are undecided, so "
        "robust accuracy at 0.5/255 lies between 10.0% and 40.0%. The same command with a larger budget, or none, goes "
        "on from here."
    )


def test_the_page_shows_bounds_forecast_and_no_classes(stopped: tuple[Path, Summary]) -> None:
    folder, summary = stopped
    write_report(folder, folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert robust_bounds(summary.per_eps[0]) in page
    assert success_bounds(summary.per_eps[0]) in page
    assert "Which classes fall" not in page
    assert "Stopped early" in page
    assert "90 images to attack: at most 7,560 encoder passes (about 1 min 3 s)" in page


def test_a_forecast_names_what_it_does_not_know() -> None:
    assert forecast(COST).endswith("at least 180 (1.5 s); on top of it x:y, of unknown cost.")
    looks = COST.model_copy(update={"second_looks": True, "unknown": []})
    assert forecast(looks).endswith("; second looks at more than one apparent success of an image come on top.")
    assert forecast(COST.model_copy(update={"images": 1})).startswith("1 image to attack")

"""Runs under a budget: stopped cleanly, honest about what is open, and continued to the same end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from attacking import CURVE, prepared, rows, table

from robustvlm.commands.attack.record import verdict
from robustvlm.commands.attack.summary import Summary
from robustvlm.commands.common.store import read_journal
from robustvlm.runs.settings import Observer

Photos = Callable[..., Path]


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").write_text("report")
    )
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


def spent(summary: Summary) -> int:
    return summary.cost.forward_passes + summary.cost.backward_passes


@pytest.mark.equality
def test_a_growing_budget_narrows_the_bounds_and_ends_at_the_same_results(make_folder: Photos) -> None:
    photos = make_folder()
    straight = prepared(photos, name="straight", **CURVE)
    end = straight.run()
    assert end.unfinished is None
    run, bounds = prepared(photos, name="budget", **CURVE), []
    for passes in (900, 1100, 1500, 2000):
        summary = run.run(budget=f"{passes}passes")
        at = summary.per_eps[-1]
        if summary.unfinished is None:
            break
        assert spent(summary) <= passes
        assert summary.unfinished.startswith(f"the budget of {passes}passes was spent in ")
        assert at.robust_accuracy_at_most is not None
        bounds.append((at.robust_accuracy.successes, at.robust_accuracy_at_most.successes))
        assert at.robust_accuracy_at_most.successes == at.robust + at.undecided
        open_rows = {row["image_id"] for row in rows(run) if row["eps"] == at.eps and row["outcome"] == "undecided"}
        assert at.undecided == len(open_rows) > 0
        assert "images are undecided, so robust accuracy at 4/255 lies between" in verdict(summary)
        assert not run.folder.finished
        assert not any(check.name == "extra attacks" for check in summary.checks)
    assert len(bounds) >= 2
    final = run.run()
    known = final.per_eps[-1].robust
    assert all(low <= known <= high for low, high in bounds)
    assert [high - low for low, high in bounds] == sorted((high - low for low, high in bounds), reverse=True)
    assert final.unfinished is None
    assert run.folder.finished
    assert table(run).equals(table(straight))
    assert [at.model_dump() for at in final.per_eps] == [at.model_dump() for at in end.per_eps]


@pytest.mark.equality
def test_a_budget_spent_before_the_attacks_says_what_was_not_looked_at(make_folder: Photos) -> None:
    run = prepared(make_folder(24), lanes=4)
    summary = run.run(budget="1pass")
    # The model's first questions are asked at once; the images wait.
    assert summary.unfinished == "the budget of 1pass was spent in the clean pass, with 0 of 24 images classified"
    assert summary.images.evaluated == 0
    again = run.run(budget="1pass")
    assert spent(again) == spent(summary), "a budget that is spent is not spent again"
    timed = run.run(budget="0.000001s")
    assert timed.unfinished is not None
    assert timed.unfinished.startswith("the budget of 0.000001s was spent in the clean pass")
    assert run.run().unfinished is None


@pytest.mark.equality
def test_a_finished_run_needs_no_budget(make_folder: Photos) -> None:
    run = prepared(make_folder(12))
    done = run.run(budget="1e9passes")
    assert done.unfinished is None
    assert run.run(budget="1pass") == done


@pytest.mark.equality
def test_the_estimate_bounds_what_the_attacks_cost_and_keeps_the_clean_pass(make_folder: Photos) -> None:
    photos = make_folder()
    run = prepared(photos, checks="none", **CURVE)
    found = run.estimate()
    assert not run.folder.summary_path.exists()
    kinds = [fact["kind"] for fact in read_journal(run.folder.journal_path)]
    assert kinds.count("clean") == 36
    assert "attack" not in kinds
    before = sum(fact["forward_passes"] + fact["backward_passes"] for fact in costs(run.folder.journal_path))

    said: list[str] = []

    class Listener(Observer):
        def say(self, line: str) -> None:
            said.append(line)

    summary = run.run(Listener())
    likely = {"likely_least": None, "likely_most": None, "likely_after": None}
    assert summary.estimate.model_copy(update=likely) == found, "the first forecast is the run's"
    assert found.images == summary.images.clean_correct
    assert f"at most {found.passes_most:,} encoder passes" in said[0]
    assert f"at least {found.passes_least:,} (" in said[0]
    probing = before - 36  # the second session asks the model its first questions again
    attacks = spent(summary) - before - probing
    assert found.passes_least <= attacks <= found.passes_most
    assert 0 < found.seconds_least < found.seconds_most
    assert json.loads(run.folder.summary_path.read_text())["estimate"]["passes_most"] == found.passes_most
    assert run.estimate().images == 0


def costs(journal: Path) -> list[dict[str, int]]:
    """Return the last note of the costs of every session."""
    return list({fact["session"]: fact for fact in read_journal(journal) if fact["kind"] == "cost"}.values())

"""All numbers of a run agree, whatever the goal, the model and its end: rows, summary, terminal, page and JSON."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from attacking import Attacking, Interrupt, prepared, run_in_pieces
from rich.console import Console

from robustvlm.attacks.goals import Goal
from robustvlm.commands.attack.record import load_run, open_ended, verdict
from robustvlm.commands.attack.report import attack_report
from robustvlm.commands.attack.summary import EpsSummary, Summary, parse_condition
from robustvlm.report.page import page_of
from robustvlm.report.screen import show
from robustvlm.report.words import bounds, pass_rows, percent
from robustvlm.runs.records import Check
from robustvlm.stats import Rate

Photos = Callable[..., Path]
TREE = "parent,child\nthing,pet\nthing,wild\npet,cat\npet,dog\nwild,fox\n"
ATTACKS = {"attack": "pgd:steps=3,apgd-t:steps=3", "eps": "1/255,4/255"}


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "robustvlm.commands.attack.work.write_report", lambda folder: (folder / "report.html").write_text("report")
    )
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


def agree(run: Attacking) -> Summary:
    """Check every number of a run that is shown anywhere against the others; return the summary."""
    record = load_run(run.folder.path)
    summary, rows = record.summary, pq.read_table(run.folder.results_path).to_pylist()
    assert summary == Summary.model_validate_json(run.folder.summary_path.read_text())
    goals = dict.fromkeys(row["goal"] for row in rows)
    mine = [row for row in rows if row["goal"] == next(iter(goals), None)]
    images = {row["image_id"]: row for row in mine}
    found = summary.images
    assert found.evaluated == len(images)
    assert summary.clean_accuracy.total == len(images) + found.waiting
    assert found.clean_correct == sum(row["label"] == row["clean_prediction"] for row in images.values())
    for at in summary.per_eps:
        check_eps(summary, at, [row for row in mine if row["eps"] <= at.eps], images)
    assert_nested(summary)
    check_cost(summary, rows)
    check_pages(run, summary)
    return summary


def check_eps(summary: Summary, at: EpsSummary, rows: list[dict[str, Any]], images: dict[str, Any]) -> None:
    total, waiting = len(images) + summary.images.waiting, summary.images.waiting
    fell = {row["image_id"] for row in rows if row["outcome"] == "fooled"}
    wrong = {row["image_id"] for row in rows if row["outcome"] == "clean_wrong"}
    assert at.fooled == len(fell - wrong)
    assert at.fooled + at.robust + at.undecided + len(wrong) == total
    assert at.robust_accuracy_at_most is not None
    assert at.attack_success_rate_at_least is not None
    assert at.attack_success_rate_at_most is not None
    assert (at.robust_accuracy.successes, at.robust_accuracy.total) == (at.robust, total)
    assert at.robust_accuracy_at_most.successes == at.robust + at.undecided
    assert (at.attack_success_rate.successes, at.attack_success_rate.total) == (at.fooled, at.fooled + at.robust)
    exposed = total - len(wrong)
    for rate, count in (
        (at.attack_success_rate_at_least, at.fooled), (at.attack_success_rate_at_most, at.fooled + at.undecided),
    ):  # fmt: skip
        assert (rate.successes, rate.total) == (count, exposed)
    if exposed and not at.undecided:
        assert at.attack_success_rate.value == pytest.approx(1 - at.robust / exposed)
    here = [row for row in rows if row["eps"] == at.eps]
    for attack in at.per_attack:
        count = Counter(row["outcome"] for row in here if row["attack"] == attack.attack)
        assert (attack.fooled, attack.failed) == (count["fooled"], count["failed"])
        assert attack.passes == sum(row["passes"] for row in here if row["attack"] == attack.attack)
        assert attack.attacked == attack.fooled + attack.failed + count["robust"]
        assert attack.robust_accuracy_after_at_most is not None
        assert attack.robust_accuracy_after.total == attack.robust_accuracy_after_at_most.total == total
        assert attack.robust_accuracy_after.successes <= attack.robust_accuracy_after_at_most.successes
    if rows:
        assert at.per_attack[-1].robust_accuracy_after == at.robust_accuracy
        assert at.per_attack[-1].robust_accuracy_after_at_most == at.robust_accuracy_at_most
    for groups in (at.per_class, *([at.per_superclass] if at.per_superclass else [])):
        assert sum(group.images for group in groups) == total - waiting
        assert sum(group.fooled for group in groups) == at.fooled
        assert sum(group.undecided for group in groups) == at.undecided - waiting
    for level in at.levels:
        assert level.robust_accuracy_at_most is not None
        assert level.robust_accuracy.successes <= level.robust_accuracy_at_most.successes
        assert level.robust_accuracy_at_most.successes <= level.clean_accuracy.successes + waiting
        if level.level == 0 and summary.goal == "misclassify" and not summary.can_reject:
            assert level.clean_accuracy == summary.clean_accuracy
            assert (level.robust_accuracy, level.robust_accuracy_at_most) == (
                at.robust_accuracy, at.robust_accuracy_at_most,
            )  # fmt: skip


def assert_nested(summary: Summary) -> None:
    """A larger ball, a later attack and a coarser level can only move in one direction."""
    left: list[Rate] = [attack.robust_accuracy_after for at in summary.per_eps for attack in at.per_attack]
    most = [attack.robust_accuracy_after_at_most for at in summary.per_eps for attack in at.per_attack]
    for rates in (left, most):
        values = [rate.successes for rate in rates if rate is not None]
        assert values == sorted(values, reverse=True)
    for at in summary.per_eps:
        right = [level.robust_accuracy.successes for level in at.levels]
        assert right == sorted(right)


def check_cost(summary: Summary, rows: list[dict[str, Any]]) -> None:
    cost = summary.cost
    assert cost.passes is not None
    assert cost.passes.total == cost.forward_passes + cost.backward_passes
    assert cost.passes.images == sum(row["passes"] for row in rows)
    assert min(cost.passes.model_dump().values()) >= 0
    shown = dict(pass_rows(cost))
    assert sum(list(shown.values())[:-1]) == list(shown.values())[-1] == cost.passes.total


def check_pages(run: Attacking, summary: Summary) -> None:
    stream = io.StringIO()
    report = attack_report(load_run(run.folder.path), drawn=False)  # pictures take the most time, and show no number
    show(Console(file=stream, width=240), report)
    page = page_of(report)
    text = re.sub(r"<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL)
    cost = summary.cost
    assert cost.passes is not None
    for shown in (stream.getvalue(), " ".join(text.split())):
        flat = " ".join(shown.replace("&#39;", "'").replace("&#34;", '"').split())
        assert verdict(summary) in flat
        assert f"{cost.forward_passes:,}" in flat
        assert f"{cost.passes.total:,}" in flat
        for at in summary.per_eps:
            pairs = [(a.robust_accuracy_after, a.robust_accuracy_after_at_most) for a in at.per_attack]
            pairs.append((at.robust_accuracy, at.robust_accuracy_at_most))
            if at is summary.per_eps[-1]:
                pairs += [(level.robust_accuracy, level.robust_accuracy_at_most) for level in at.levels]
            for least, most in pairs:
                wanted = bounds(least, most) if open_ended(summary, least, most) else percent(least.value)
                assert wanted in flat


def test_a_plain_run(make_folder: Photos) -> None:
    run = prepared(make_folder(12), **ATTACKS)
    run.run()
    summary = agree(run)
    assert summary.cost.passes is not None
    assert summary.cost.passes.spare > 0
    assert summary.cost.passes.clean == 12
    assert summary.cost.passes.checks == summary.cost.passes.untold == 0


def test_budgets_that_end_in_every_part_of_a_run(make_folder: Photos, tmp_path: Path) -> None:
    photos = make_folder(16)
    (tmp_path / "tree.csv").write_text(TREE)
    run = prepared(photos, lanes=4, tree=tmp_path / "tree.csv", **ATTACKS)
    parts = set()
    bound: tuple[float, float] = (0.0, 1.0)
    for passes in (1, 60, 90, 130, 190, 260, 10**6):
        run.run(budget=f"{passes}passes")
        summary = agree(run)
        at = summary.per_eps[-1]
        assert at.robust_accuracy_at_most is not None
        now = (at.robust_accuracy.value or 0.0, at.robust_accuracy_at_most.value or 0.0)
        assert bound[0] <= now[0] <= now[1] <= bound[1], "more budget never takes back what a smaller one said"
        bound = now
        parts.add((summary.unfinished or "the end").partition(" with ")[0].rpartition(" in ")[2])
        if summary.unfinished:
            assert parse_condition("asr>0.99").holds(summary) or not at.undecided
            assert parse_condition("robust_accuracy<0.01").holds(summary) or at.robust
    assert bound[0] == bound[1]
    assert "the clean pass," in parts
    assert "the end" in parts
    assert len(parts) >= 3


def test_a_resumed_run_counts_what_was_lost(make_folder: Photos) -> None:
    photos = make_folder(12)
    whole = prepared(photos, name="whole", **ATTACKS)
    whole.run()
    pieces = run_in_pieces(lambda: prepared(photos, **ATTACKS), [3, 14])
    assert [at.model_dump() for at in agree(pieces).per_eps] == [at.model_dump() for at in agree(whole).per_eps]


def test_a_session_killed_after_its_last_note_of_cost(make_folder: Photos) -> None:
    """The journal then holds images of which the notes know nothing."""
    run = prepared(make_folder(8), **ATTACKS)
    with pytest.raises(KeyboardInterrupt):
        run.run(Interrupt(10))
    head, *lines = run.folder.journal_path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "cost"]
    first = next(line for line in lines if json.loads(line)["kind"] == "cost")
    run.folder.journal_path.write_text("\n".join([head, first, *kept]) + "\n")
    run.run()
    agree(run)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("Encoder", {"goal": "superclass:matrix"}),
        ("Encoder", {"goal": "superclass:1"}),
        ("Encoder", {"goal": "feature", "min_cos": 0.9}),
        ("Encoder", {"goal": "targeted:cat"}),
        ("Encoder+reject:0.34", {}),
        ("Encoder+reject:0.34", {"goal": "deny"}),
        ("Random", {"eot": 2, "draws": 3}),
        ("NaNOffGrid", {}),
        ("Encoder", {"precision": "bf16", "checks": "full"}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_goals_and_models(make_folder: Photos, tmp_path: Path, model: str, settings: dict[str, Any]) -> None:
    (tmp_path / "tree.csv").write_text(TREE)
    run = prepared(make_folder(8), model, tree=tmp_path / "tree.csv", **{**ATTACKS, **settings})
    run.run(budget="150passes")
    agree(run)
    run.run()
    assert agree(run).unfinished is None


def test_notes_about_the_data_do_not_excuse_a_gradient(make_folder: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only declared stand-ins make "gradient as stated" a note."""
    run = prepared(make_folder(8), checks="quick")
    aim = replace(run.work.aim, notes=(Check(name="data and class names", level="note", message="junk left out."),))
    seen = []

    def judged(*_: Any, declared: bool, **__: Any) -> list[Check]:
        seen.append(declared)
        return []

    monkeypatch.setattr("robustvlm.commands.attack.checks.of_sanity", judged)
    run.work = replace(run.work, aim=aim)
    run.run()
    assert seen == [False]
    assert issubclass(type(aim.goals[0]), Goal)

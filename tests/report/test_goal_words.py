"""Every goal has its words in the terminal and in the report; runs from before there were goals stay readable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import terminal

from robustvlm.attacks.goals import goal_words
from robustvlm.commands.attack.compare import apart, compare, comparison_report
from robustvlm.commands.attack.plots import curve_of, security_curve
from robustvlm.commands.attack.record import load_run, verdict
from robustvlm.commands.attack.report import write_report
from robustvlm.commands.attack.summary import summarise
from robustvlm.report.page import page_of
from robustvlm.report.words import sentence

WriteRun = Callable[..., Path]
LEVELS = [{"tree": "thing", "level": 0, "of": list(range(6))}, {"tree": "thing", "level": 1, "of": [0, 0, 1, 1, 2, 2]}]
GOALS = ["misclassify", "superclass:1", "superclass:all", "superclass:matrix", "targeted:class 002", "deny", "intrude",
         "feature", "feature:a <b>dog</b>"]  # fmt: skip


def with_goal(folder: Path, goal: str, *, can_reject: bool = False, classless: bool = False) -> Path:
    """Turn a run folder into one for a goal, as the program would write it; `classless`: nothing names a class."""
    manifest = json.loads((folder / "manifest.json").read_text())
    goals = ["superclass:0", "superclass:1", "superclass:all"] if goal == "superclass:matrix" else [goal]
    manifest["config"] |= {"goal": goal, "goals": goals, "min_cos": 0.5}
    manifest["data"]["levels"] = LEVELS
    manifest["model"]["can_reject"] = can_reject
    found: list[dict[str, Any]] = []
    for row in pq.read_table(folder / "results.parquet").to_pylist():
        for number, name in enumerate(goals):
            cosine = 0.3 + 0.1 * number if goal.startswith("feature") else None
            said = {"clean_prediction": -1, "adversarial_prediction": -1} if classless else {}
            found.append(row | said | {"goal": name, "cosine": cosine, "clean_cosine": cosine and 1.0})
    pq.write_table(pa.Table.from_pylist(found), folder / "results.parquet")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text(summarise(found, manifest).model_dump_json())
    return folder


@pytest.mark.parametrize("goal", GOALS)
def test_terminal_and_report_speak_of_the_goal(goal: str, write_run: WriteRun, tmp_path: Path) -> None:
    refuses = goal in ("deny", "intrude")
    folder = write_run(tmp_path / "run", images=40, n_classes=6, n_superclasses=3)
    record = load_run(with_goal(folder, goal, can_reject=refuses))
    words = goal_words(goal, can_reject=refuses, min_cos=0.5)
    said = verdict(record.summary)
    assert words.effect in said
    assert words.whom in said
    assert "worst case over 2 attacks per image" in said
    said = terminal(record, 200)
    assert sentence(words.held) in said
    page = write_report(folder).read_text(encoding="utf-8")
    assert sentence(words.held).replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<b>dog" not in page
    for part, shown in (
        ("Accepted and rejected", refuses),
        ("Mean cosine", goal.startswith("feature")),
        ("all levels at once", goal == "superclass:matrix"),
        ("By level of the class tree", goal != "superclass:matrix"),
    ):
        assert (part in said) == shown, part
    assert ("Attacked</th>" in page) == (goal == "superclass:matrix")
    assert len(record.rows) == 40 * 3 * 2, "of several goals, the rows of the first"


@pytest.mark.parametrize(("goal", "refuses"), [("misclassify", False), ("misclassify", True), ("deny", True)])
def test_a_security_curve_is_of_one_share_throughout(
    goal: str, refuses: bool, write_run: WriteRun, tmp_path: Path
) -> None:
    folder = with_goal(write_run(tmp_path / "run", images=40, n_classes=6, n_superclasses=3), goal, can_reject=refuses)
    table = pq.read_table(folder / "results.parquet").to_pylist()
    if refuses:  # some are refused without an attack, which is neither right nor what `misclassify` is after
        found = [row | ({"clean_prediction": -1} if row["index"] % 4 == 0 else {}) for row in table]
        summary = summarise(found, json.loads((folder / "manifest.json").read_text()))
        assert summary.images.exposed != summary.images.clean_correct
    else:
        summary = load_run(folder).summary
    curve = curve_of(summary, "a")
    assert curve.rates[0].successes == summary.images.exposed
    for at, rate in zip(summary.per_eps, curve.rates[1:], strict=True):
        assert rate.successes == summary.images.exposed - at.fooled - at.undecided
    words = goal_words(goal, can_reject=refuses)
    assert curve.held == (words.held if refuses else "still right")
    drawn = str(security_curve([curve], key="k", norm="L∞"))
    assert (words.held.capitalize() if refuses else "Accuracy") + " against perturbation size" in drawn


@pytest.mark.parametrize("goal", ["feature", "unsay", "say:a cat", "reword"])
def test_no_accuracy_is_told_where_nothing_names_a_class(goal: str, write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", images=40, n_classes=6, n_superclasses=3)
    record = load_run(with_goal(folder, goal, classless=True))
    exposed = record.summary.images.exposed
    assert not record.summary.says_classes
    assert record.summary.clean_accuracy.successes == exposed > 0, "and not 0 for predictions that are none"
    said = terminal(record, 200)
    page = write_report(folder).read_text(encoding="utf-8")
    for text in (said, page):
        assert "level of the class tree" not in text
        assert "clean accuracy" not in text.lower()
        assert "rejected before any attack" not in text


def test_words_of_goals_differ() -> None:
    assert len({goal_words(goal).effect for goal in GOALS if goal != "superclass:matrix"}) == len(GOALS) - 1
    assert goal_words("superclass:matrix").effect == goal_words("misclassify").effect
    assert not goal_words("superclass:matrix").leave
    assert goal_words("misclassify", can_reject=True).effect != goal_words("misclassify").effect


def test_runs_are_compared_only_on_the_same_goal(write_run: WriteRun, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, images=40, n_classes=6, n_superclasses=3) for name in ("a", "b", "c")]
    records = [
        load_run(folders[0]),
        load_run(with_goal(folders[1], "misclassify")),
        load_run(with_goal(folders[2], "superclass:1")),
    ]
    conditions = [(c.first, c.second, c.condition) for c in compare(*records)]
    assert (0, 1, "L∞ 2/255") in conditions
    assert [condition for first, second, condition in conditions if second == 2] == ["unperturbed", "unperturbed"]
    assert "2/255" in page_of(comparison_report(records, compare(*records)))


def test_right_or_rejected_is_not_compared_with_right(write_run: WriteRun, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, images=40, n_classes=6, n_superclasses=3) for name in ("a", "b", "c")]
    refusing = [load_run(with_goal(folder, "misclassify", can_reject=True)) for folder in folders[:2]]
    records = [*refusing, load_run(with_goal(folders[2], "misclassify"))]
    conditions = [(c.first, c.second, c.condition) for c in compare(*records)]
    assert (0, 1, "L∞ 2/255") in conditions
    assert [condition for _, second, condition in conditions if second == 2] == ["unperturbed", "unperturbed"]
    said = "are not tested against each other under attack: what holds is “right or rejected” for the one and “robust"
    assert said in page_of(comparison_report(records, compare(*records)))
    assert len(apart(records, ["a", "b", "c"])) == 2


def test_superclasses_of_one_name_and_other_classes_are_not_compared(write_run: WriteRun, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, images=40, n_classes=6, n_superclasses=3) for name in ("a", "b", "c")]
    for folder in folders:
        with_goal(folder, "superclass:1")
    manifest = json.loads((folders[2] / "manifest.json").read_text())
    manifest["data"]["levels"][1]["of"] = [0, 1, 1, 2, 2, 0]
    (folders[2] / "manifest.json").write_text(json.dumps(manifest))
    records = [load_run(folder) for folder in folders]
    assert apart(records, ["a", "b", "c"]) == [
        f"{name} and c are not tested against each other under attack: their superclasses are not the same."
        for name in ("a", "b")
    ]
    assert [c.condition for c in compare(*records) if c.second == 2] == ["unperturbed", "unperturbed"]
    assert len(compare(*records[:2])) == 4


def test_a_run_without_goals_is_one_of_misclassification(write_run: WriteRun, tmp_path: Path) -> None:
    record = load_run(write_run(tmp_path / "old", images=30, n_classes=6, n_superclasses=3))
    content = json.loads((record.folder / "summary.json").read_text())
    for new in ("goal", "min_cos", "can_reject", "unfinished", "estimate"):
        content.pop(new, None)
    for at in content["per_eps"]:
        for new in ("levels", "transfer", "cosine", "acceptance", "robust_accuracy_at_most"):
            at.pop(new, None)
    for new in ("exposed", "left_out"):
        content["images"].pop(new, None)
    (record.folder / "summary.json").write_text(json.dumps(content))
    old = load_run(record.folder)
    assert old.summary.goal == "misclassify"
    assert "make the model wrong on" in write_report(record.folder).read_text(encoding="utf-8")

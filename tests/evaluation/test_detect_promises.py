"""Promised answers in detect runs: the rules, the goal of attacks on them, and a run from the options to the report."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from detecting import ATTACK, DetectRun, lasting
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.attacks.goals.base import REJECTED, Case
from robustvlm.attacks.objectives import objective
from robustvlm.commands.detect.attack import ScoreAttacks
from robustvlm.commands.detect.measures import Scored
from robustvlm.commands.detect.promised import Level, promise_of, read_level, rules_of, summarise
from robustvlm.commands.detect.promised_attack import WrongAnswer, unsettled
from robustvlm.commands.detect.view import write_report
from robustvlm.detect import Promise
from robustvlm.errors import UserError

PROMISE = {**ATTACK, "scores": "energy,msp", "attack_scores": "energy", "promise": "0.3"}


@pytest.mark.parametrize(
    ("text", "found"), [("0.9", Level(0.9, False)), ("90%", Level(0.9, False)), (" 95 % : class", Level(0.95, True))]
)
def test_levels(text: str, found: Level) -> None:
    assert read_level(text) == found
    assert read_level(found.text) == found


@pytest.mark.parametrize("text", ["", "1", "0", "90", "nan", "class", "0.9:", "0.9:all", "-0.1"])
def test_no_levels(text: str) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        read_level(text)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_wrong_answer_is_reached_where_the_margin_says_so(seed: int) -> None:
    """Coarse numbers, so that scores stand on thresholds; a second implementation, row by row."""
    draws = np.random.default_rng(seed)
    thresholds = tuple(float(t) if draws.random() < 0.7 else math.inf for t in draws.integers(0, 4, 4) / 4)
    rule = Promise(0.9, 0.95, thresholds)
    logits, scores, labels = (
        draws.permuted(np.tile(np.arange(4.0), (30, 1)), axis=1),
        draws.integers(0, 4, 30) / 4,
        draws.integers(0, 4, 30),
    )
    output = torch.from_numpy(np.column_stack([logits, scores])).float()
    goal, case, said = WrongAnswer(rule), Case(torch.from_numpy(labels)), logits.argmax(1)
    wrong = rule.answered(scores, said) & (said != labels)
    assert goal.reached(output, case).tolist() == wrong.tolist()
    assert (goal.margin(output, case) < 0).tolist() == wrong.tolist()
    assert goal.prediction(output).tolist() == [
        k if a else REJECTED for k, a in zip(said, rule.answered(scores, said), strict=True)
    ]


def test_the_loss_climbs_to_a_class_that_is_answered() -> None:
    """Class 1 leads the wrong ones and is never answered: the way to a wrong answer is class 2 and the score."""
    goal = WrongAnswer(Promise(0.9, 0.95, (0.5, math.inf, 0.5)))
    output = torch.tensor([[3.0, 2.0, 1.0, 0.1]], requires_grad=True)
    case = Case(torch.tensor([0]), reference=goal.reference(output.detach(), torch.tensor([0])))
    (slope,) = torch.autograd.grad(goal.loss(output, objective("ce"), case).sum(), output)
    assert slope[0, 0] < 0
    assert slope[0, 1] == 0
    assert slope[0, 2] > 0
    assert slope[0, 3] == 0  # the class first
    output = torch.tensor([[1.0, 0.0, 3.0, 0.1]], requires_grad=True)
    (slope,) = torch.autograd.grad(goal.loss(output, objective("ce"), case).sum(), output)
    assert slope[0, 3] > 0


def test_the_loss_rises_all_the_way_over_a_dip_of_the_score() -> None:
    """From a right answer hardly above its threshold to a wrong one a score like MSP falls and rises again."""
    goal = WrongAnswer(Promise(0.9, 0.95, (0.5,)))
    ahead = torch.linspace(1, -1, 21)
    path = torch.stack([ahead, torch.zeros(21), 0.51 * ahead.abs()], dim=1)
    case = Case(torch.zeros(21, dtype=torch.int64))
    case = Case(case.label, reference=goal.reference(path, case.label)[:1].expand(21, 2))
    assert (goal.loss(path, objective("ce"), case).diff() > 0).all()
    assert goal.reached(path, case).tolist() == [False] * 20 + [True]


def scored(groups: int, copies: int) -> Scored:
    """Sure and right, or unsure and wrong; each drawing comes in several copies."""
    count = groups * copies
    labels = [0] * count
    said = [0 if g % 3 else 1 for g in range(groups) for _ in range(copies)]
    scores = np.array([0.9 if g % 3 else 0.1 for g in range(groups) for _ in range(copies)])
    ids = [f"{g}-{c}" for g in range(groups) for c in range(copies)]
    return Scored("known", ids, [name.split("-")[0] for name in ids], labels, said, {"msp": scores})


def test_copies_count_once() -> None:
    known = scored(200, 3)
    rules = rules_of(known, Level(0.9, False), 2)
    groups = [known.groups[row] for row in (*rules.calibration, *rules.judged)]
    assert sorted(groups) == sorted(set(known.groups))
    copies = {known.ids[row].split("-")[1] for row in (*rules.calibration, *rules.judged)}
    assert len(copies) > 1  # copies may differ in difficulty: not the first of every drawing
    assert len(rules.calibration) == len(rules.judged) == 100
    assert rules.of["msp"].thresholds == rules_of(scored(200, 1), Level(0.9, False), 2).of["msp"].thresholds == (0.9,)


def test_the_summary_counts_by_hand() -> None:
    known = scored(200, 1)
    rules = rules_of(known, Level(0.9, True), 2)
    strange = Scored("far", ["a", "b", "c"], ["a", "b", "c"], [-1] * 3, [0, 0, 1], {"msp": np.array([0.95, 0.5, 0.95])})
    found = summarise(rules, known, [strange], ["cat", "dog"], {})
    (msp,) = found.scores
    right = sum(known.predictions[row] == 0 for row in rules.judged)
    assert msp.thresholds == [0.9, None]
    assert (msp.answered.successes, msp.answered.total) == (right, 100)
    assert msp.right is not None
    assert msp.lowest is not None
    assert (msp.right.value, msp.lowest.class_name, msp.lowest.right.value, msp.promised) == (1.0, "cat", 1.0, 1)
    assert (msp.unknown["far"].successes, msp.unknown["far"].total) == (1, 3)
    assert promise_of(found, "msp") == rules.of["msp"]
    assert promise_of(found, "energy") is None


def test_copies_of_strangers_count_once() -> None:
    known = scored(200, 1)
    rules = rules_of(known, Level(0.9, False), 2)
    copies = Scored("far", [*"abcd"], ["x", "x", "x", "y"], [-1] * 4, [0] * 4, {"msp": np.array([0.95] * 3 + [0.5])})
    (msp,) = summarise(rules, known, [copies], ["cat", "dog"], {}).scores
    assert (msp.unknown["far"].successes, msp.unknown["far"].total) == (1, 2)


def test_images_that_no_attack_ended_on_count_for_nothing() -> None:
    facts = {
        ("msp", "promised", "pgd", name): SimpleNamespace(score="msp", set="promised", image_id=name, outcome=outcome)
        for name, outcome in (("a", "robust"), ("b", "failed"), ("c", "fooled"))
    }
    ended = {key[3] for key in facts}
    ledger = SimpleNamespace(found=facts, done=lambda *_: ended)
    work = cast(ScoreAttacks, SimpleNamespace(ledger=ledger, attacks=[SimpleNamespace(name="pgd")]))
    assert unsettled(work, "msp", {"a", "b", "unread"}) == {"b", "unread"}


def test_a_run(detect_run: DetectRun) -> None:
    run = detect_run(**PROMISE)
    done = run.start()
    found = done.summary.promised
    assert found is not None
    assert found.level == 0.3
    assert [score.name for score in found.scores] == ["msp", "energy"]
    energy = next(score for score in found.scores if score.name == "energy")
    assert energy.attacked is not None
    assert energy.attacked.attacked.successes > energy.attacked.clean.successes
    rows = pq.read_table(run.folder.results_path).to_pylist()
    near = [row for row in rows if row["set"] == "near"]
    rule = done.promise("energy")
    answered = rule.answered([row["energy"] for row in near], [row["prediction"] for row in near])
    assert energy.unknown["near"].successes == answered.sum()
    facts = [r for r in pq.read_table(run.folder.attacked_path).to_pylist() if r["set"] == "promised"]
    assert {r["outcome"] == "fooled" for r in facts} == {r["attacked"] > 0 for r in facts}
    assert max(r["linf"] for r in facts) <= 8 / 255 + 1e-9
    report = write_report(run.folder.path).read_text(encoding="utf-8")
    assert "Answers promised to be 30.0% right" in report
    assert "Under attack the promise is void" in report
    assert "not of the best of several" in report
    lowest = energy.lowest
    assert lowest is not None
    assert f"{lowest.class_name} ({lowest.right.successes} of {lowest.right.total})" in report
    with pytest.raises(UserError, match="no promise for a score 'knn'"):
        done.promise("knn")


def test_attacks_on_promises_are_not_made_twice(detect_run: DetectRun) -> None:
    first = detect_run(**PROMISE).start()
    again = detect_run(**PROMISE)
    (again.folder.path / "summary.json").unlink()
    again.folder.results_path.unlink()
    before = again.folder.journal_path.read_text(encoding="utf-8").count('"attacked"')
    assert lasting(again.start().summary) == lasting(first.summary)
    assert again.folder.journal_path.read_text(encoding="utf-8").count('"attacked"') == before


def test_without_enough_images_nothing_is_promised(detect_run: DetectRun) -> None:
    run = detect_run(scores="msp", promise="0.99:class").start()
    found = run.summary.promised
    assert found is not None
    assert found.scores[0].thresholds == [None] * 3
    assert found.scores[0].right is None
    assert any(check.name == "no promise" for check in run.summary.checks)


def test_a_wrong_level_is_refused_before_any_work(detect_run: DetectRun) -> None:
    with pytest.raises(UserError, match="promise takes a share"):
        detect_run(promise="90")

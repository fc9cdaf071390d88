"""Published attacks as stages of a run, and as the second opinion after our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from attacking import outcomes, prepared, rows, run_in_pieces

from robustvlm.attacks import FOOLED, ROBUST
from robustvlm.errors import UserError

MakeFolder = Callable[..., Path]
MIXED = {"attack": "fgsm,torchattacks:PGD:steps=3,autoattack:apgd-ce:steps=3", "eps": "1/255,3/255"}


def test_they_stand_beside_our_own(make_folder: MakeFolder) -> None:
    run = prepared(make_folder(), **MIXED)
    summary = run.run()
    at = summary.per_eps[0]
    assert [item.attack for item in at.per_attack] == MIXED["attack"].split(",")
    assert at.per_attack[1].attacked == at.per_attack[0].attacked - at.per_attack[0].fooled
    assert at.per_attack[1].passes >= 6 * at.per_attack[1].attacked
    assert [check.level for check in summary.checks if check.name == "inside the ball"] == ["ok"]
    assert summary.cost.backward_passes > 0


@pytest.mark.equality
def test_an_interrupted_run_ends_with_the_same_images(make_folder: MakeFolder) -> None:
    photos = make_folder(18)
    straight = prepared(photos, out=photos.parent / "straight", **MIXED)
    straight.run()
    pieces = run_in_pieces(lambda: prepared(photos, **MIXED), [20, 30])
    assert [row[:3] for row in outcomes(pieces)] == [row[:3] for row in outcomes(straight)]
    assert {row["outcome"] for row in rows(pieces)} <= {"fooled", "robust", "skipped", "clean_wrong"}


def test_a_second_opinion_goes_over_what_ours_left(make_folder: MakeFolder) -> None:
    run = prepared(make_folder(), attack="apgd-ce:steps=10", second_opinion="torchattacks:FGSM", eps="1/255")
    summary = run.run()
    assert run.manifest["config"]["attack"] == ["apgd-ce:steps=10", "torchattacks:FGSM"]
    ours, theirs = summary.per_eps[0].per_attack
    assert theirs.attacked == ours.attacked - ours.fooled > 0
    (check,) = [check for check in summary.checks if check.name == "second opinion"]
    assert check.level == "ok"
    assert f"attacked the {theirs.attacked} image" in check.message


def test_a_disagreement_is_reported_and_counts(make_folder: MakeFolder) -> None:
    """One step in a tiny fraction of the ball is no attack; theirs finds what it leaves."""
    weak = "pgd:steps=1:step_size=1e-6"
    run = prepared(make_folder(), attack=weak, second_opinion="autoattack:apgd-ce:steps=10", eps="4/255")
    summary = run.run()
    found = {(row["attack"], row["image_id"]): row["outcome"] for row in rows(run)}
    only = {name for (attack, name), outcome in found.items() if attack != weak and outcome == FOOLED}
    assert only
    assert all(found[weak, name] == ROBUST for name in only)
    (check,) = [check for check in summary.checks if check.name == "second opinion"]
    assert check.level == "fault"
    assert all(f"'{name}'" in check.message for name in sorted(only)[:3])
    assert summary.per_eps[0].fooled == len(only) + sum(
        1 for key, value in found.items() if key[0] == weak and value == FOOLED
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"second_opinion": "apgd-ce"}, "must come from one attack of another program"),
        ({"second_opinion": "autoattack,torchattacks:PGD"}, "must come from one attack"),
        ({"attack": "autoattack", "second_opinion": "autoattack"}, "among the attacks already"),
        ({"attack": "torchattacks:PGDL2"}, "knows only L2 balls"),
        ({"second_opinion": "autoattack"}, "needs at least 4 classes, here are 3"),
        ({"attack": "torchattacks:PGD", "goal": "targeted:cat"}, "knows only the goal misclassify"),
    ],
)
def test_mistakes_are_found_before_any_work(make_folder: MakeFolder, settings: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepared(make_folder(6), **{"attack": "pgd:steps=2", **settings})


@pytest.mark.parametrize("model", ["Random", "SmallMemory", "NaNOffGrid"])
def test_models_with_peculiarities(make_folder: MakeFolder, model: str) -> None:
    spec = "torchattacks:PGD:steps=2"
    run = prepared(make_folder(10), model, attack=spec, eps="4/255", checks="none", draws=3, eot=1)
    summary = run.run()
    attacked = [row for row in rows(run) if row["outcome"] not in ("clean_wrong", "skipped")]
    assert attacked
    assert all(row["attack"] == spec and row["linf"] <= 4 / 255 * (1 + 1e-9) for row in attacked)
    if model == "NaNOffGrid":
        assert {row["outcome"] for row in attacked} == {"failed"}
        assert "failed images" in [check.name for check in summary.checks]


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_of_the_run_give_the_same_verdicts(make_folder: MakeFolder, precision: str) -> None:
    """The packages always compute in float32; the run's precision is for our own gradients."""
    photos = make_folder(12)
    settings = {"attack": "autoattack:apgd-ce:steps=4", "eps": "2/255", "checks": "none"}
    runs = [prepared(photos, out=photos.parent / name, precision=name, **settings) for name in ("fp32", precision)]
    for run in runs:
        run.run()
    assert outcomes(runs[0]) == outcomes(runs[1])


def test_a_budget_ends_them_between_passes(make_folder: MakeFolder) -> None:
    run = prepared(make_folder(20), attack="torchattacks:PGD:steps=50", eps="1/255", checks="none")
    summary = run.run(budget="300passes")
    assert summary.unfinished is not None
    assert summary.cost.forward_passes + summary.cost.backward_passes <= 300
    assert run.run().unfinished is None

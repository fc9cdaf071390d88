"""The summary against a brute-force count over random but consistent runs."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from robustvlm.commands.attack.summary import Summary, summarise
from robustvlm.runs.records import Check, Cost, UnreadableImage
from robustvlm.stats import Rate, rate

CLASSES = ["cat", "dog", "car", "bus"]
SUPERCLASSES = {"cat": "animal", "dog": "animal", "car": "vehicle", "bus": "vehicle"}
Row = dict[str, Any]


def manifest_of(eps: list[float], attacks: list[str]) -> dict[str, Any]:
    return {
        "config": {"norm": "Linf", "eps": eps, "eps_text": [f"e{e:g}" for e in eps], "attack": attacks},
        "data": {"class_names": CLASSES, "superclasses": SUPERCLASSES},
    }


def row_of(image: int, label: int, clean: int, attack: str, eps: float, outcome: str, work: int = 1) -> Row:
    return {
        "index": image,
        "image_id": f"img-{image}",
        "label": label,
        "clean_prediction": clean,
        "attack": attack,
        "eps": eps,
        "outcome": outcome,
        "steps": work,
        "passes": work + 1,
    }


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Row], dict[str, Any]]:
    """A run as the engine writes it: eps rising, attacks in order, later stages skipped once an image has fallen."""
    eps = sorted(draw(st.sets(st.sampled_from([0.01, 0.02, 0.04, 0.08]), min_size=1, max_size=3)))
    attacks = draw(st.permutations(["pgd", "apgd-ce", "square"]))[: draw(st.integers(1, 3))]
    rows = []
    for image in range(draw(st.integers(0, 12))):
        label, clean = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        fallen = False
        for radius in eps:
            for attack in attacks:
                if clean != label:
                    outcome = "clean_wrong"
                elif fallen:
                    outcome = "skipped"
                else:
                    outcome = draw(st.sampled_from(["fooled", "robust", "robust", "failed"]))
                fallen = fallen or outcome == "fooled"
                work = 0 if outcome in ("clean_wrong", "skipped") else draw(st.integers(1, 20))
                rows.append(row_of(image, label, clean, attack, radius, outcome, work))
    return draw(st.permutations(rows)), manifest_of(eps, list(attacks))


def brute_force(rows: list[Row], image: int, eps: float) -> str:
    """The verdict by its definition: any success inside the ball; else robust only if every attack here held."""
    mine = [row for row in rows if row["index"] == image]
    if mine[0]["label"] != mine[0]["clean_prediction"]:
        return "wrong"
    if any(row["outcome"] == "fooled" and row["eps"] <= eps for row in mine):
        return "fooled"
    return "robust" if all(row["outcome"] == "robust" for row in mine if row["eps"] == eps) else "undecided"


@settings(max_examples=80, deadline=None)
@given(runs())
def test_counts_match_brute_force(run: tuple[list[Row], dict[str, Any]]) -> None:
    rows, manifest = run
    summary = summarise(rows, manifest)
    label = {row["index"]: row["label"] for row in rows}
    correct = {row["index"] for row in rows if row["label"] == row["clean_prediction"]}
    assert summary.images.evaluated == len(label)
    assert summary.clean_accuracy == rate(len(correct), len(label))
    assert [e.eps for e in summary.per_eps] == manifest["config"]["eps"]
    for at in summary.per_eps:
        verdict = {image: brute_force(rows, image, at.eps) for image in label}
        found = list(verdict.values())
        fooled, robust = found.count("fooled"), found.count("robust")
        assert (at.fooled, at.robust, at.undecided) == (fooled, robust, found.count("undecided"))
        assert at.robust_accuracy == rate(robust, len(label))
        assert at.attack_success_rate == rate(fooled, fooled + robust)
        for groups, name in (
            (at.per_class, CLASSES.__getitem__),
            (at.per_superclass, lambda i: SUPERCLASSES[CLASSES[i]]),
        ):
            assert [g.name for g in groups] == sorted({name(i) for i in label.values()})
            for group in groups:
                mine = [verdict[image] for image in label if name(label[image]) == group.name]
                assert group.images == len(mine)
                assert group.clean_correct == len(mine) - mine.count("wrong")
                assert group.attack_success_rate == rate(
                    mine.count("fooled"), mine.count("fooled") + mine.count("robust")
                )


@settings(max_examples=40, deadline=None)
@given(runs(), st.integers(2, 4), st.integers(0, 3))
def test_copies_of_every_image_leave_intervals_as_they_were(
    run: tuple[list[Row], dict[str, Any]], copies: int, waiting: int
) -> None:
    rows, manifest = run
    several = [
        {**row, "index": copies * row["index"] + copy, "image_id": f"{row['image_id']}#{copy}"}
        for row in rows
        for copy in range(copies)
    ]
    waiting *= bool(rows)
    alone = summarise(rows, manifest, waiting=waiting)
    awaited = [f"waiting {number}" for number in range(waiting)] * copies
    both = summarise(
        several, manifest, waiting=len(awaited), awaited=awaited, group=lambda name: name.rpartition("#")[0]
    )
    assert both.images.worth == alone.images.worth == alone.images.evaluated

    def same(first: Any, second: Any) -> None:
        if isinstance(first, Rate):
            assert second.total == copies * first.total
            assert second.value == first.value
            assert (second.low, second.high) == pytest.approx((first.low, first.high))
        elif isinstance(first, BaseModel):
            for name in type(first).model_fields:
                same(getattr(first, name), getattr(second, name))
        elif isinstance(first, list):
            for one, other in zip(first, second, strict=True):
                same(one, other)

    same(alone, both)


def test_images_that_wait_and_may_be_copies_of_those_seen_add_nothing() -> None:
    rows = [row_of(image, 0, 0, "pgd", 0.1, "robust") for image in range(4)]
    found = summarise(rows, manifest_of([0.1], ["pgd"]), waiting=12, awaited=[])
    (at,) = found.per_eps
    for share, hits in ((found.clean_accuracy, 4), (at.robust_accuracy, 4), (at.robust_accuracy_at_most, 16)):
        assert share is not None
        assert share == rate(hits, 16, independent=4)
    assert at.attack_success_rate == rate(0, 4)
    assert (found.images.worth, found.images.worth_in_all) == (4, 4)
    # Of no image seen, and of none attacked, intervals are those of one.
    for few in ([], [row_of(0, 0, 1, "pgd", 0.1, "clean_wrong")]):
        early = summarise(few, manifest_of([0.1], ["pgd"]), waiting=5, awaited=[])
        assert Summary.model_validate_json(early.model_dump_json()) == early
        assert early.per_eps[0].attack_success_rate_at_most == rate(5, 5, independent=1)
    with pytest.raises(ValueError, match="2 images are awaited and 1 wait"):
        summarise(rows, manifest_of([0.1], ["pgd"]), waiting=1, awaited=["a", "b"])


@settings(max_examples=40, deadline=None)
@given(runs())
def test_attacks_form_a_cascade_and_the_curve_falls(run: tuple[list[Row], dict[str, Any]]) -> None:
    rows, manifest = run
    for at in summarise(rows, manifest).per_eps:
        left = [a.robust_accuracy_after.successes for a in at.per_attack]
        assert left == sorted(left, reverse=True)
        if left:
            assert [a.attack for a in at.per_attack] == manifest["config"]["attack"]
            assert left[-1] == at.robust
        for attack in at.per_attack:
            mine = [r for r in rows if r["attack"] == attack.attack and r["eps"] == at.eps]
            assert attack.steps == sum(r["steps"] for r in mine)
            assert attack.passes == sum(r["passes"] for r in mine)
            assert attack.attacked == sum(r["outcome"] in ("fooled", "robust", "failed") for r in mine)
    rates = [at.fooled for at in summarise(rows, manifest).per_eps]
    assert rates == sorted(rates)


@settings(max_examples=30, deadline=None)
@given(runs())
def test_table_list_and_json_agree(run: tuple[list[Row], dict[str, Any]]) -> None:
    rows, manifest = run
    summary = summarise(rows, manifest)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
    if rows:
        assert summarise(pa.Table.from_pylist(rows), manifest) == summary


def test_a_broken_attack_is_neither_success_nor_robustness() -> None:
    rows = [
        row_of(0, 0, 0, "pgd", 0.1, "failed"),
        row_of(1, 0, 0, "pgd", 0.1, "robust"),
        row_of(2, 0, 0, "pgd", 0.1, "fooled"),
    ]
    (at,) = summarise(rows, manifest_of([0.1], ["pgd"])).per_eps
    assert at.undecided == 1
    assert at.robust_accuracy == rate(1, 3)
    assert at.attack_success_rate == rate(1, 2)
    assert at.per_attack[0].failed == 1


def test_an_image_without_the_row_of_an_attack_is_undecided() -> None:
    rows = [row_of(0, 0, 0, "pgd", 0.1, "robust"), row_of(1, 0, 0, "pgd", 0.1, "robust")]
    rows.append(row_of(0, 0, 0, "square", 0.1, "robust"))
    (at,) = summarise(rows, manifest_of([0.1], ["pgd", "square"])).per_eps
    assert (at.robust, at.undecided) == (1, 1)


def test_ensemble_parts_named_only_by_rows_keep_their_order() -> None:
    rows = [row_of(0, 0, 0, name, 0.1, "robust") for name in ("apgd-ce", "apgd-t")]
    (at,) = summarise(rows, manifest_of([0.1], ["autoattack"])).per_eps
    assert [a.attack for a in at.per_attack] == ["apgd-ce", "apgd-t"]


def test_a_run_without_images_still_has_a_summary() -> None:
    summary = summarise([], manifest_of([0.1], ["pgd"]), unreadable=[UnreadableImage(id="x", reason="truncated")])
    assert summary.clean_accuracy.value is None
    assert summary.per_eps[0].attack_success_rate.value is None
    assert (summary.images.evaluated, summary.images.unreadable) == (0, 1)


def test_extras_are_carried_through() -> None:
    cost, check = Cost(forward_passes=3), Check(name="nan", level="ok", message="none seen")
    summary = summarise([], manifest_of([], []), cost=cost, checks=[check])
    assert summary.cost == cost
    assert summary.checks == [check]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        Check.model_validate({"name": "a", "level": "ok", "message": "", "surprise": 1})

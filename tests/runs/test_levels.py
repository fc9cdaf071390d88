"""Accuracy per level and the transfer matrix against a count by their definitions, over random rows."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.commands.attack.summary import Summary, summarise

CLASSES = ["cat", "dog", "car", "bus"]
PAIRS = [0, 0, 1, 1]
LEVELS = [{"tree": "thing", "level": 0, "of": [0, 1, 2, 3]}, {"tree": "thing", "level": 1, "of": PAIRS}]
EPS, ATTACKS = [0.01, 0.02], ["pgd", "apgd"]
Row = dict[str, Any]


def manifest_of(goals: list[str], **model: Any) -> dict[str, Any]:
    config = {"norm": "Linf", "eps": EPS, "eps_text": ["a", "b"], "attack": ATTACKS}
    return {
        "config": config
        | {"goal": "superclass:matrix" if len(goals) > 1 else goals[0], "goals": goals, "min_cos": 0.5},
        "model": model,
        "data": {"class_names": CLASSES, "superclasses": None, "levels": LEVELS},
    }


def of_level(goal: str) -> list[int]:
    return LEVELS[0]["of"] if goal.endswith("0") else PAIRS  # type: ignore[return-value]


@st.composite
def matrix_rows(draw: st.DrawFn, goals: list[str]) -> list[Row]:
    """Every image attacked at every stage, whatever it was before."""
    rows = []
    for image in range(draw(st.integers(1, 6))):
        label, clean = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        for goal in goals:
            group = of_level(goal)
            for eps in EPS:
                for attack in ATTACKS:
                    said = draw(st.integers(0, 3))
                    outcome = "fooled" if group[said] != group[label] else "robust"
                    if group[clean] != group[label]:
                        outcome = "clean_wrong"
                    rows.append(
                        {"index": image, "image_id": str(image), "label": label, "clean_prediction": clean,
                         "attack": attack, "eps": eps, "goal": goal, "outcome": outcome, "steps": 3, "passes": 8,
                         "adversarial_prediction": said}
                    )  # fmt: skip
    return rows


def right(rows: list[Row], goal: str, eps: float, group: list[int]) -> int:
    """Images whose group is right, unperturbed and at every point recorded for a goal in balls up to eps."""
    count = 0
    for image in {row["index"] for row in rows}:
        mine = [row for row in rows if row["index"] == image and row["goal"] == goal and row["eps"] <= eps]
        said = [mine[0]["clean_prediction"], *(row["adversarial_prediction"] for row in mine)]
        count += all(group[prediction] == group[mine[0]["label"]] for prediction in said)
    return count


GOALS = ["superclass:0", "superclass:1"]


@given(matrix_rows(GOALS), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_matrix_counts_what_is_right_at_a_level_after_attacks_on_another(rows: list[Row], shuffle: Any) -> None:
    shuffle.shuffle(rows)
    summary = summarise(rows, manifest_of(GOALS))
    for at, eps in zip(summary.per_eps, EPS, strict=True):
        assert at.transfer is not None
        assert at.levels == []
        for row, goal in zip(at.transfer.rows, GOALS, strict=True):
            for rate, level in zip(row.robust_accuracy, LEVELS, strict=True):
                assert rate.successes == right(rows, goal, eps, level["of"])  # type: ignore[arg-type]
        # The verdict of the run is about the classes.
        assert at.robust_accuracy == at.transfer.rows[0].robust_accuracy[0]
        assert at.transfer.rows[0].robust_accuracy[0].successes <= at.transfer.rows[0].robust_accuracy[1].successes


@given(matrix_rows(["misclassify:0"]))
@settings(max_examples=60, deadline=None)
def test_any_run_with_a_tree_shows_its_levels(rows: list[Row]) -> None:
    # As an ordinary run leaves them: nothing after the first success, nothing where the image was wrong when clean.
    fallen: set[int] = set()
    for row in sorted(rows, key=lambda row: (row["index"], row["eps"], ATTACKS.index(row["attack"]))):
        row["goal"] = "misclassify"
        if row["outcome"] == "clean_wrong" or row["index"] in fallen:
            row |= {"outcome": "skipped" if row["index"] in fallen else "clean_wrong", "steps": 0}
            row["adversarial_prediction"] = -2
        elif row["outcome"] == "fooled":
            fallen.add(row["index"])
    summary = summarise(rows, manifest_of(["misclassify"]))
    for at, eps in zip(summary.per_eps, EPS, strict=True):
        assert at.transfer is None
        for found, level in zip(at.levels, LEVELS, strict=True):
            said = [row for row in rows if row["adversarial_prediction"] >= 0]
            quiet = [row | {"adversarial_prediction": row["clean_prediction"]} for row in rows if row not in said]
            assert found.robust_accuracy.successes == right(said + quiet, "misclassify", eps, level["of"])  # type: ignore[arg-type]
        assert at.levels[0].robust_accuracy == at.robust_accuracy


def refused(outcomes: list[tuple[int, str, int, float]]) -> Summary:
    """Runs of a model that may refuse: per image clean prediction, and per stage outcome, prediction and margin."""
    rows = [
        {"index": image, "image_id": str(image), "label": 0, "clean_prediction": clean, "attack": "pgd", "eps": 0.01,
         "goal": "deny", "outcome": outcome, "steps": 1, "passes": 2, "adversarial_prediction": said,
         "margin": margin, "clean_margin": 1.0}
        for image, (clean, outcome, said, margin) in enumerate(outcomes)
    ]  # fmt: skip
    return summarise(rows, manifest_of(["deny"], can_reject=True))


def test_acceptance_is_counted_before_and_after() -> None:
    found = refused(
        [(0, "fooled", -1, -0.1), (0, "robust", 0, 0.4), (-1, "clean_wrong", -2, 0.0), (1, "robust", 1, 0.1)]
    )
    accepted = found.per_eps[0].acceptance
    assert accepted is not None
    assert (accepted.clean_accepted, accepted.clean_rejected) == (3, 1)
    assert (accepted.accepted, accepted.rejected) == (2, 2)
    assert found.can_reject
    assert found.per_eps[0].attack_success_rate.total == 3


def test_cosines_are_those_of_the_worst_points() -> None:
    rows = [
        {"index": image, "image_id": str(image), "label": 0, "clean_prediction": 0, "attack": attack, "eps": eps,
         "goal": "feature", "outcome": "fooled" if cosine < 0.5 else "robust", "steps": 9, "passes": 20,
         "adversarial_prediction": 0, "margin": cosine - 0.5, "clean_margin": 0.5, "cosine": cosine,
         "clean_cosine": 1.0}
        for image, attack, eps, cosine in [
            (0, "pgd", 0.01, 0.9), (0, "apgd", 0.01, 0.7), (0, "pgd", 0.02, 0.4), (0, "apgd", 0.02, 0.6),
            (1, "pgd", 0.01, 0.8), (1, "apgd", 0.01, 0.9), (1, "pgd", 0.02, 0.95), (1, "apgd", 0.02, 0.9),
        ]
    ]  # fmt: skip
    small, large = summarise(rows, manifest_of(["feature"])).per_eps
    assert small.cosine is not None
    assert large.cosine is not None
    assert small.cosine.attacked.value == (0.7 + 0.8) / 2
    assert large.cosine.attacked.value == (0.4 + 0.8) / 2, "a point of a small ball lies in the large one"
    assert large.cosine.clean.value == 1
    assert (small.fooled, large.fooled) == (0, 1)

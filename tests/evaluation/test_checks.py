"""The findings about an evaluation: each fires when it should, and only then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from robustvlm.attacks import PGD, Oracle, Probe, ThreatModel, parse_attacks
from robustvlm.attacks.honesty import Sanity
from robustvlm.commands.attack import checks as findings
from robustvlm.commands.attack.store import AttackFact, CleanFact
from robustvlm.commands.attack.verdicts import NO_ANSWER
from robustvlm.commands.common import questions
from robustvlm.errors import UserError

SOUND = Probe(finite=True, repeat_change=0.0, batch_change=0.0, zero_gradients=0.0, rungs=(8,))
SANE = Sanity(
    images=32,
    probabilities=False,
    saturated=0.0,
    noise_wins=0,
    gradient_wins=32,
    derivative=0.99,
    right=30,
    ranges={"[0, 255]": (0, 25), "[-1, 1]": (1, 10)},
    classes=10,
)
CLEAN = [CleanFact(i, f"img-{i}", 1, 1, 0.5, 0.9, [0], exposed=True) for i in range(3)]


def found(
    outcome: str = "fooled",
    *,
    linf: float = 0.1,
    l2: float = 0.1,
    eps: float = 0.1,
    index: int = 0,
    attack: str = "pgd",
    goal: str = "misclassify",
) -> AttackFact:
    return AttackFact(index, attack, eps, goal, outcome, 0, 3, 8, linf, l2, -0.1, 0.7, 0, 0.5)


def levels(probe: Probe) -> dict[str, str]:
    return {check.name: check.level for check in questions.of_probe(probe)}


def of_results(
    facts: list[AttackFact],
    *,
    clean: list[CleanFact] = CLEAN,
    threat: ThreatModel = ThreatModel("Linf", 0.1),  # noqa: B008
    attack: str = "pgd",
    classes: int = 10,
    **more: Any,
) -> dict[str, tuple[str, str]]:
    made = findings.of_results(clean, facts, threats=[threat], attacks=parse_attacks(attack), n_classes=classes, **more)
    return {check.name: (check.level, check.message) for check in made}


def test_nothing_is_wrong_with_a_sound_model() -> None:
    assert set(levels(SOUND).values()) == {"ok"}
    assert {level for level, _ in of_results([found()]).values()} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"finite": False}, "finite output", "fault"),
        ({"repeat_change": 0.5}, "repeatable output", "warning"),
        ({"repeat_change": 0.5}, "independent images", "note"),
        ({"zero_gradients": 0.5}, "useful gradients", "warning"),
    ],
)
def test_an_odd_model_is_told(change: dict[str, object], name: str, level: str) -> None:
    odd = levels(replace(SOUND, **change))
    assert odd[name] == level


def test_a_random_model_that_is_averaged_over_is_no_cause_for_alarm() -> None:
    odd = replace(SOUND, repeat_change=0.5)
    oracle = Oracle(torch.nn.Identity(), eot=10, draws=21)
    oracle.upholding = 101
    (check,) = [check for check in questions.of_probe(odd, oracle) if check.name == "repeatable output"]
    assert check.level == "note"
    assert "10 draws" in check.message
    assert "21 fresh draws" in check.message
    assert "101 more" in check.message


def of_sanity(
    change: dict[str, Any], *, attack: str = "pgd", zero_gradients: float = 0.0, declared: bool = False
) -> dict[str, tuple[str, str]]:
    made = questions.of_sanity(
        replace(SANE, **change), attacks=parse_attacks(attack), zero_gradients=zero_gradients, declared=declared
    )
    return {check.name: (check.level, check.message) for check in made}


def test_a_sane_model_raises_nothing() -> None:
    assert {level for level, _ in of_sanity({}).values()} == {"ok"}
    assert set(of_sanity({})) == {"logits", "gradient against noise", "gradient as stated", "input range"}


@pytest.mark.parametrize(
    ("change", "name", "level"),
    [
        ({"probabilities": True}, "logits", "warning"),
        ({"saturated": 0.5}, "logits", "warning"),
        ({"noise_wins": 17, "gradient_wins": 15}, "gradient against noise", "warning"),
        ({"noise_wins": 4, "gradient_wins": 3}, "gradient against noise", "note"),
        ({"derivative": 0.7}, "gradient as stated", "warning"),
        ({"derivative": -1.0}, "gradient as stated", "warning"),
        ({"right": 3, "ranges": {"[0, 255]": (25, 0)}}, "input range", "fault"),
        ({"right": 20, "ranges": {"[0, 255]": (9, 0), "[-1, 1]": (1, 1)}}, "input range", "warning"),
    ],
)
def test_words_and_deeds_that_differ_are_told(change: dict[str, Any], name: str, level: str) -> None:
    found_levels = {key: said for key, (said, _) in of_sanity(change).items()}
    assert found_levels.pop(name) == level
    assert set(found_levels.values()) == {"ok"}


@pytest.mark.parametrize(
    "change",
    [
        {"saturated": 0.05},
        {"noise_wins": 15, "gradient_wins": 17},
        {"derivative": 0.9},
        {"right": 20, "ranges": {"[0, 255]": (6, 0)}},  # too small a gain
        {"right": 10, "ranges": {"[0, 255]": (14, 7)}},  # a gain that chance explains
    ],
)
def test_what_chance_and_curvature_do_alarms_nobody(change: dict[str, Any]) -> None:
    assert {level for level, _ in of_sanity(change).values()} == {"ok"}


def test_saturation_matters_less_where_another_loss_is_attacked_too() -> None:
    level, message = of_sanity({"saturated": 1.0}, attack="apgd-ce,apgd-t")["logits"]
    assert level == "note"
    assert "apgd-t does not saturate" in message


def test_a_declared_stand_in_for_a_gradient_is_a_note() -> None:
    assert of_sanity({"derivative": 0.1}, declared=True)["gradient as stated"][0] == "note"


def test_missing_gradients_are_named_once() -> None:
    odd = of_sanity({"derivative": 0.0, "noise_wins": 30, "gradient_wins": 2}, zero_gradients=1.0)
    assert set(odd) == {"logits", "input range"}


def test_features_are_no_logits() -> None:
    assert "logits" not in of_sanity({"classes": 0, "right": None, "ranges": {}})


def blind_spot(fallen: int, attack: str = "pgd,square", *, left: str = "robust") -> dict[str, tuple[str, str]]:
    clean = [replace(CLEAN[0], index=i) for i in range(100)]
    facts = [found(left, index=i, attack="pgd") for i in range(100)]
    facts += [found("fooled" if i < fallen else "robust", index=i, attack="square") for i in range(100)]
    return of_results(facts, clean=clean, attack=attack)


@pytest.mark.parametrize(("fallen", "level"), [(0, "ok"), (1, "note"), (2, "warning"), (40, "warning")])
def test_a_black_box_attack_must_not_find_what_gradients_leave(fallen: int, level: str) -> None:
    assert blind_spot(fallen)["black box against white box"][0] == level


def test_a_black_box_attack_alone_or_first_says_nothing() -> None:
    assert "black box against white box" not in blind_spot(40, "square")
    assert blind_spot(40, left="failed")["black box against white box"][0] == "ok"


def withstood(
    count: int, *, eps: float = 4 / 255, goal: str = "misclassify", norm: str = "Linf", **more: Any
) -> dict[str, Any]:
    clean = [replace(CLEAN[0], index=i) for i in range(100)]
    facts = [
        found("robust" if i < count else "fooled", index=i, eps=eps, goal=goal, linf=0.0, l2=0.0) for i in range(100)
    ]
    more = {"undefended": "tiny", "pixels": 3 * 64 * 64, "threat": ThreatModel(norm, eps), **more}
    return of_results(facts, clean=clean, **more)


def test_an_undefended_model_that_looks_robust_is_told() -> None:
    level, message = withstood(30)["attack strength"]
    assert level == "warning"
    assert "30 of 100 images withstood" in message
    assert "'tiny'" in message


def test_only_a_large_ball_an_undefended_model_and_many_images_give_cause() -> None:
    assert "attack strength" not in withstood(12)
    assert "attack strength" not in withstood(90, eps=2 / 255)
    assert "attack strength" not in withstood(90, goal="deny")
    assert "attack strength" not in withstood(90, undefended=None)
    assert "attack strength" not in withstood(90, eps=1.0, norm="L2")
    assert "attack strength" in withstood(90, eps=2.0, norm="L2")


@pytest.mark.parametrize("change", [{"repeat_change": 1e-6}, {"batch_change": 1e-6}, {"zero_gradients": 0.05}])
def test_rounding_and_a_few_sure_images_alarm_nobody(change: dict[str, float]) -> None:
    odd = replace(SOUND, **change)
    assert set(levels(odd).values()) == {"ok"}
    questions.require_independent_rows(odd, "m")


def test_a_coupled_model_is_refused_and_a_random_one_is_not() -> None:
    coupled = replace(SOUND, batch_change=0.25)
    with pytest.raises(UserError, match=r"'my model' .* moved by 0.25 standard deviations .* use lanes=1"):
        questions.require_independent_rows(coupled, "my model")
    questions.require_independent_rows(replace(coupled, repeat_change=0.3), "my model")


def test_shortcuts_for_deterministic_models_are_dropped_for_random_ones() -> None:
    (attack,) = parse_attacks("pgd")
    assert questions.fit_for(attack, SOUND) is attack
    fitted = questions.fit_for(attack, replace(SOUND, repeat_change=0.5))
    assert isinstance(fitted, PGD)
    assert not fitted.detect_cycles
    assert replace(fitted, detect_cycles=True) == attack
    for attack in parse_attacks("apgd-t,fab-t,square"):
        assert questions.fit_for(attack, SOUND) is attack
        assert questions.fit_for(attack, replace(SOUND, repeat_change=0.5)) == attack.exhaustive() != attack


@pytest.mark.parametrize(
    ("norm", "fact", "inside"),
    [
        ("Linf", found(linf=0.1, l2=3.0), True),
        ("Linf", found(linf=0.1001, l2=0.01), False),
        ("L2", found(linf=0.5, l2=0.1), True),
        ("L2", found(linf=0.01, l2=0.1001), False),
        ("Linf", found("robust", linf=0.5), True),
    ],
)
def test_a_success_outside_the_ball_is_a_fault(norm: str, fact: AttackFact, inside: bool) -> None:
    level, message = of_results([fact], threat=ThreatModel(norm, 0.1))["inside the ball"]
    assert level == ("ok" if inside else "fault")
    assert inside or message.startswith("1 adversarial")


def test_answers_that_could_not_be_had_are_counted() -> None:
    broken = [*CLEAN[:2], replace(CLEAN[2], prediction=NO_ANSWER)]
    level, message = of_results([found("failed"), found()], clean=broken)["failed images"]
    assert level == "fault"
    assert message.startswith("2 answers")


def test_too_few_classes_for_a_loss_are_noted() -> None:
    assert "objective, of apgd-t" not in of_results([], attack="apgd-t", classes=4)
    for classes in (2, 3):
        level, message = of_results([], attack="apgd-t", classes=classes)["objective, of apgd-t"]
        assert level == "note"
        assert "needs 4 classes" in message


def test_a_model_that_is_never_right_leaves_nothing_to_attack() -> None:
    wrong = [replace(fact, prediction=0, exposed=False) for fact in CLEAN]
    assert of_results([], clean=wrong)["something to attack"][0] == "fault"


@pytest.mark.parametrize(("eps", "fires"), [(1e-9, True), (1e-300, True), (1e-6, False), (1 / 255, False)])
def test_a_radius_in_which_nothing_can_move_is_no_test(eps: float, fires: bool) -> None:
    found = findings.of_results([], [], threats=[ThreatModel("Linf", eps)], attacks=[], n_classes=3)
    assert any(check.name == "size of the radius" and check.level == "warning" for check in found) is fires

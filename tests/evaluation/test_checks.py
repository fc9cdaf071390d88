"""The findings about an evaluation: each fires when it should, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from robustvlm.attacks import PGD, Probe, ThreatModel, parse_attacks
from robustvlm.errors import UserError
from robustvlm.evaluation import checks
from robustvlm.runs.results import AttackFact, CleanFact

SOUND = Probe(finite=True, repeat_change=0.0, batch_change=0.0, zero_gradients=0.0, rungs=(8,))
CLEAN = [CleanFact(i, f"img-{i}", 1, 1, 0.5, 0.9, [0]) for i in range(3)]


def found(outcome: str = "fooled", *, linf: float = 0.1, l2: float = 0.1, eps: float = 0.1) -> AttackFact:
    return AttackFact(0, "pgd", eps, outcome, 0, 3, 8, linf, l2, -0.1, 0.7, 0, 0.5)


def levels(probe: Probe) -> dict[str, str]:
    return {check.name: check.level for check in checks.of_probe(probe)}


def of_results(
    facts: list[AttackFact],
    *,
    clean: list[CleanFact] = CLEAN,
    threat: ThreatModel = ThreatModel("Linf", 0.1),  # noqa: B008
    attack: str = "pgd",
    classes: int = 10,
) -> dict[str, tuple[str, str]]:
    made = checks.of_results(clean, facts, threats=[threat], attacks=parse_attacks(attack), n_classes=classes)
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


@pytest.mark.parametrize("change", [{"repeat_change": 1e-6}, {"batch_change": 1e-6}, {"zero_gradients": 0.05}])
def test_rounding_and_a_few_sure_images_alarm_nobody(change: dict[str, float]) -> None:
    odd = replace(SOUND, **change)
    assert set(levels(odd).values()) == {"ok"}
    checks.require_independent_rows(odd, "m")


def test_a_coupled_model_is_refused_and_a_random_one_is_not() -> None:
    coupled = replace(SOUND, batch_change=0.25)
    with pytest.raises(UserError, match=r"'my model' .* moved by 0.25 standard deviations .* use --lanes 1"):
        checks.require_independent_rows(coupled, "my model")
    checks.require_independent_rows(replace(coupled, repeat_change=0.3), "my model")


def test_shortcuts_for_deterministic_models_are_dropped_for_random_ones() -> None:
    (attack,) = parse_attacks("pgd")
    assert checks.fit_for(attack, SOUND) is attack
    fitted = checks.fit_for(attack, replace(SOUND, repeat_change=0.5))
    assert isinstance(fitted, PGD)
    assert not fitted.detect_cycles
    assert replace(fitted, detect_cycles=True) == attack


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
    broken = [*CLEAN[:2], replace(CLEAN[2], prediction=-1)]
    level, message = of_results([found("failed"), found()], clean=broken)["failed images"]
    assert level == "fault"
    assert message.startswith("2 answers")


def test_too_few_classes_for_a_loss_are_noted() -> None:
    assert "objective of apgd-t" not in of_results([], attack="apgd-t", classes=4)
    for classes in (2, 3):
        level, message = of_results([], attack="apgd-t", classes=classes)["objective of apgd-t"]
        assert level == "note"
        assert "needs 4 classes" in message


def test_a_model_that_is_never_right_leaves_nothing_to_attack() -> None:
    wrong = [replace(fact, prediction=0) for fact in CLEAN]
    assert of_results([], clean=wrong)["something to attack"][0] == "fault"

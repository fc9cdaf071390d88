"""Conditions such as `asr>0.5`: what they accept, and when they hold."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.commands.attack.summary import Condition, EpsSummary, Images, Summary, parse_condition
from robustvlm.errors import UserError
from robustvlm.runs.records import Comparison, Cost
from robustvlm.stats import rate

SIGNS = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
RATES = ("asr", "robust_accuracy", "clean_accuracy")


def at(eps: float, *, fooled: int, robust: int) -> EpsSummary:
    nothing: dict[str, Any] = {"per_attack": [], "per_class": [], "per_superclass": []}
    return EpsSummary(
        eps=eps,
        eps_text=f"{eps}",
        fooled=fooled,
        robust=robust,
        undecided=0,
        robust_accuracy=rate(robust, 100),
        attack_success_rate=rate(fooled, fooled + robust),
        **nothing,
    )


def summary(*points: EpsSummary, correct: int = 80) -> Summary:
    return Summary(
        norm="Linf",
        images=Images(evaluated=100, unreadable=0, clean_correct=correct),
        clean_accuracy=rate(correct, 100),
        per_eps=list(points),
        cost=Cost(),
        checks=[],
        unreadable=[],
    )


CURVE = summary(at(0.01, fooled=20, robust=60), at(0.02, fooled=60, robust=20))


@given(
    st.sampled_from(RATES),
    st.sampled_from(["", ".low", ".high"]),
    st.sampled_from(list(SIGNS)),
    st.integers(0, 100),
    st.booleans(),
    st.sampled_from(["", " ", "  "]),
)
def test_the_grammar(name: str, part: str, sign: str, number: int, percent: bool, gap: str) -> None:
    text = f"{gap}{name}{part}{gap}{sign}{gap}{number if percent else number / 100}{gap}{'%' if percent else ''}{gap}"
    threshold: Any = pytest.approx(number / 100)
    assert parse_condition(text) == Condition(Comparison(text, name, part[1:] or "value", sign, threshold, percent))


@given(st.sampled_from(list(SIGNS)), st.integers(0, 100), st.sampled_from(["value", "low", "high"]))
def test_it_holds_when_it_is_true_at_any_eps(sign: str, percent: int, part: str) -> None:
    condition = parse_condition(f"asr{'' if part == 'value' else '.' + part}{sign}{percent}%")
    rates = [point.attack_success_rate for point in CURVE.per_eps]
    expected = any(SIGNS[sign](getattr(found, part), percent / 100) for found in rates)
    assert condition.holds(CURVE) == expected


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("asr>74%", True),
        ("asr>75%", False),
        ("asr>=75%", True),
        ("asr.low>75%", False),
        ("asr.high>0.75", True),
        ("robust_accuracy<0.2", False),
        ("robust_accuracy<=20%", True),
        ("clean_accuracy<0.8", False),
        ("clean_accuracy.low<0.8", True),
        ("asr>2e-1", True),
    ],
)
def test_examples(text: str, holds: bool) -> None:
    assert parse_condition(text).holds(CURVE) is holds


def test_a_gate_that_could_not_be_checked_stays_shut() -> None:
    nothing = summary(at(0.01, fooled=0, robust=0), correct=0)
    assert nothing.per_eps[0].attack_success_rate.value is None
    assert parse_condition("asr>0.5").holds(nothing)
    assert parse_condition("asr<=0.5").holds(nothing)
    assert parse_condition("clean_accuracy<50%").holds(nothing)
    assert not parse_condition("clean_accuracy>50%").holds(nothing)
    assert parse_condition("asr>0.5").holds(summary())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("asr", "cannot read"),
        ("asr=0.5", "cannot read"),
        ("asr==0.5", "cannot read"),
        ("asr>", "cannot read"),
        (">0.5", "cannot read"),
        ("asr>0.5 and more", "cannot read"),
        ("asr.mean>0.5", "cannot read"),
        ("asr>nan", "cannot read"),
        ("asr>.", "is no number"),
        ("asr>1e", "is no number"),
        ("acr>0.5", "did you mean 'asr'"),
        ("robust_acuracy<0.5", "did you mean 'robust_accuracy'"),
        ("asr>50", "for per cent write asr>50%"),
        ("asr>101%", r"outside \[0, 1\]"),
        ("asr<-0.1", r"outside \[0, 1\]"),
        ("asr>1e999", r"outside \[0, 1\]"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_condition(text)
    assert text in str(caught.value)


def test_what_is_undecided_keeps_the_gate_shut() -> None:
    """A model that answers NaN under attack, or a budget that was spent, must not pass for robust."""
    point = at(0.01, fooled=1, robust=39).model_copy(
        update={
            "undecided": 40,
            "robust_accuracy_at_most": rate(79, 100),
            "attack_success_rate_at_least": rate(1, 80),
            "attack_success_rate_at_most": rate(41, 80),
        }
    )
    for text, holds in (
        ("asr>0.5", True), ("asr<2%", True), ("asr>52%", False),
        ("robust_accuracy<40%", True), ("robust_accuracy>70%", True), ("robust_accuracy>80%", False),
    ):  # fmt: skip
        assert parse_condition(text).holds(summary(point)) is holds, text

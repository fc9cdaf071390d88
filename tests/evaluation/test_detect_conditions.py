"""Conditions such as `auroc:mcm@near<0.8`: what they accept, what they ask about, and when they hold."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustvlm.commands.detect.summary import (
    AttackedOnSet,
    AttackedScore,
    DetectCondition,
    DetectConfig,
    DetectSummary,
    Measured,
    NamedData,
    OnSet,
    ScoreSummary,
    SetSummary,
    UnderAttack,
    parse_condition,
)
from robustvlm.errors import UserError
from robustvlm.runs.records import Comparison
from robustvlm.stats import rate

SIGNS = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
CLEAN = ("auroc", "fpr95", "aupr_in", "aupr_out")
ATTACKED = ("auroc_intrude", "auroc_deny", "auroc_both")
AUROC = {("mcm", "near"): 0.7, ("mcm", "far"): 0.9, ("max-logit", "near"): 0.6, ("max-logit", "far"): 0.8}


def measured(value: float) -> Measured:
    """A number whose interval reaches a tenth to either side."""
    return Measured(value=value, low=value - 0.1, high=value + 0.1, method="")


def score(name: str, changes: dict[tuple[str, str], float]) -> ScoreSummary:
    aurocs = {at: value for (mine, at), value in (AUROC | changes).items() if mine == name}
    on = [
        OnSet(
            unknown=at,
            auroc=measured(value),
            fpr95=measured(1 - value),
            aupr_in=measured(value / 2),
            aupr_out=measured(value / 3),
        )
        for at, value in aurocs.items()
    ]
    return ScoreSummary(name=name, title=name, source="", needs=[], threshold=0.0, microseconds=0.0, on=on)


def attacked(name: str, *sets: str) -> AttackedScore:
    share = rate(1, 2)
    on = [
        AttackedOnSet(
            unknown=at,
            auroc_clean=measured(0.8),
            auroc_intrude=measured(0.4),
            auroc_deny=measured(0.5),
            auroc_both=measured(0.2),
            accepted_clean=share,
            accepted_attacked=share,
        )
        for at in sets
    ]
    return AttackedScore(name=name, title=name, threshold=0.0, accepted_clean=share, accepted_attacked=share, on=on)


def summary(changes: dict[tuple[str, str], float] | None = None, *under_attack: AttackedScore) -> DetectSummary:
    parts = {
        name: SetSummary(name=name, spec=name, images=9, groups=9, unreadable=0) for name in ("known", "near", "far")
    }
    return DetectSummary(
        known=parts["known"],
        unknown=[parts["near"], parts["far"]],
        fit=None,
        left_out=0,
        classes=3,
        accuracy=rate(8, 9),
        scores=[score(name, changes or {}) for name in ("mcm", "max-logit")],
        skipped={"knn": "it learns from images: pass --fit DATA"},
        best="mcm",
        encode_ms=1.0,
        attacked=list(under_attack),
        seconds=1.0,
        checks=[],
        unreadable=[],
    )


def config(under_attack: UnderAttack | None = None) -> DetectConfig:
    return DetectConfig(
        model="tiny",
        known="emoji",
        unknown=[NamedData(name=name, spec=name) for name in ("near", "far")],
        fit=None,
        scores=["mcm", "max-logit", "knn"],
        words="",
        limit=None,
        fit_limit=None,
        draws=100,
        seed=0,
        device="cpu",
        under_attack=under_attack,
    )


ATTACKS = UnderAttack(scores=["mcm"], attack=["pgd"], norm="Linf", eps=0.01, eps_text="0.01", limit=4, lanes=4)


@given(
    st.sampled_from((*CLEAN, *ATTACKED)),
    st.sampled_from([None, "mcm", "max-logit", "own-s-dis"]),
    st.sampled_from([None, "near", "my-photos_2"]),
    st.sampled_from(["", ".low", ".high"]),
    st.sampled_from(list(SIGNS)),
    st.integers(0, 100),
    st.booleans(),
)
def test_the_grammar(
    quantity: str, score: str | None, at: str | None, part: str, sign: str, number: int, percent: bool
) -> None:
    left = quantity + (f":{score}" if score else "") + (f"@{at}" if at else "")
    text = f" {left}{part} {sign} {number if percent else number / 100}{'%' if percent else ''}"
    threshold: Any = pytest.approx(number / 100)
    expected = Comparison(text, left, part[1:] or "value", sign, threshold, percent)
    assert parse_condition(text) == DetectCondition(expected, quantity, score, at)


@given(
    st.sampled_from([None, "mcm", "max-logit"]),
    st.sampled_from([None, "near", "far"]),
    st.sampled_from(["value", "low", "high"]),
    st.sampled_from(list(SIGNS)),
    st.integers(0, 100),
)
def test_it_holds_when_it_is_true_of_any_it_is_about(
    score: str | None, at: str | None, part: str, sign: str, percent: int
) -> None:
    end = "" if part == "value" else f".{part}"
    text = f"auroc{f':{score}' if score else ''}{f'@{at}' if at else ''}{end}{sign}{percent}%"
    about = [measured(v) for (name, set_), v in AUROC.items() if score in (None, name) and at in (None, set_)]
    expected = any(SIGNS[sign](getattr(found, part), percent / 100) for found in about)
    assert parse_condition(text).holds(summary()) == expected


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("auroc:mcm@near<0.71", True),
        ("auroc:mcm@near<0.7", False),
        ("auroc:mcm@near.low<0.7", True),
        ("auroc@far<0.85", True),
        ("auroc:mcm@far<0.85", False),
        ("fpr95:max-logit>35%", True),
        ("fpr95:mcm>35%", False),
        ("fpr95:mcm.high>35%", True),
        ("aupr_in<0.31", True),
        ("aupr_out:mcm@far<0.3", False),
    ],
)
def test_examples(text: str, holds: bool) -> None:
    assert parse_condition(text).holds(summary()) is holds


def test_scores_under_attack() -> None:
    found = summary(None, attacked("mcm", "near", "far"))
    assert parse_condition("auroc_both:mcm<0.3").holds(found)
    assert not parse_condition("auroc_both<0.2").holds(found)
    assert not parse_condition("auroc_intrude@near<0.4").holds(found)
    assert parse_condition("auroc_deny.low<0.5").holds(found)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("part", ["", ".low", ".high"])
def test_a_gate_that_could_not_be_checked_stays_shut(sign: str, part: str) -> None:
    broken = summary({("mcm", "near"): math.nan})
    for about in ("auroc:mcm@near", "auroc@near", "auroc"):
        assert parse_condition(f"{about}{part}{sign}0.5").holds(broken)
    condition = parse_condition(f"auroc_both{part}{sign}0.5")
    assert condition.holds(summary()), "nothing was attacked"
    assert condition.holds(summary(None, attacked("mcm", "far"))), "no image of the other set could be attacked"
    without_ends = Measured(value=0.5, low=math.nan, high=math.nan, method="")
    assert condition.comparison.holds_for(without_ends) is (part != "" or sign in ("<=", ">="))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read"),
        ("auroc", "cannot read"),
        ("auroc==0.5", "cannot read"),
        ("auroc:<0.5", "cannot read"),
        ("auroc@near:mcm<0.5", "cannot read"),
        ("auroc.mean<0.5", "cannot read"),
        ("auroc<nan", "cannot read"),
        ("auroc<.", "is no number"),
        ("aurok<0.5", "there are auroc, fpr95, aupr_in, aupr_out, auroc_intrude, auroc_deny, auroc_both"),
        ("fpr95>50", "for per cent write fpr95>50%"),
        ("fpr95:mcm@near>101%", r"outside \[0, 1\]"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_condition(text)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "under_attack", "message"),
    [
        ("auroc:energy<0.5", None, "'energy', the run has mcm, max-logit, knn$"),
        ("auroc:own<0.5", None, "'own', the run has mcm"),
        ("auroc@nearr<0.5", None, "'nearr', the run has near, far: see ood"),
        ("auroc_both<0.5", None, "pass under_attack=True"),
        ("auroc_both:max-logit<0.5", ATTACKS, "'max-logit', the run attacks mcm$"),
    ],
)
def test_what_a_run_will_not_have_is_an_error_before_it(
    text: str, under_attack: UnderAttack | None, message: str
) -> None:
    condition = parse_condition(text)
    with pytest.raises(UserError, match=message):
        condition.require(config(under_attack), may_refuse=False)


def test_what_a_run_will_have_is_accepted() -> None:
    for text in ("auroc<0.5", "fpr95:knn@far>0.5", "auroc_deny:mcm@near<0.5"):
        parse_condition(text).require(config(ATTACKS), may_refuse=False)
    parse_condition("auroc:own<0.5").require(config(), may_refuse=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auroc:knn<0.5", "skipped: it learns from images: pass --fit DATA"),
        ("auroc:own<0.5", "'own', the run has mcm, max-logit"),
        ("auroc_both:mcm<0.5", "'mcm', the run attacks none"),
        ("auroc@third<0.5", "'third', the run has near, far"),
    ],
)
def test_what_a_run_turned_out_not_to_have_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_condition(text).holds(summary())

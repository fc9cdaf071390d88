"""Conditions such as `certified@0.25<50%`: what they accept, and when they hold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from robustvlm.commands.certify.summary import CertifySummary, RadiusShare, parse_certify_condition
from robustvlm.errors import UserError
from robustvlm.stats import rate

EXAMPLES = [
    ("certified@0.25<31%", True),
    ("certified@0.25<30%", False),
    ("certified@0.25.low<30%", True),
    ("certified_correct@0.25>=0.2", True),
    ("certified<0.8", False),
    ("certified.high>0.8", True),
    ("abstained>20%", False),
    ("correct<=0.6", True),
    ("mean_radius<0.1", False),
    ("median_radius>=0.2", True),
]


def summary(**changes: Any) -> CertifySummary:
    """The parts of a summary that conditions ask about."""
    parts: dict[str, Any] = {
        "at": [RadiusShare(radius=0.25, certified=rate(30, 100), correct=rate(20, 100), others={})],
        "abstained": rate(20, 100),
        "correct": rate(60, 100),
        "certified_correct": rate(50, 100),
        "mean_radius": 0.1,
        "median_radius": 0.2,
    }
    return CertifySummary.model_construct(**parts | changes)


@pytest.mark.parametrize(("text", "holds"), EXAMPLES)
def test_examples(text: str, holds: bool) -> None:
    assert parse_certify_condition(text).holds(summary()) is holds


def test_a_gate_that_could_not_be_checked_stays_shut() -> None:
    nothing = summary(correct=None, abstained=rate(0, 0), mean_radius=math.nan)
    for text in ("correct>0.5", "correct<0.5", "certified.low<0", "abstained>1", "mean_radius<0", "mean_radius>9"):
        assert parse_certify_condition(text).holds(nothing), text


def test_a_radius_that_was_not_counted_at_is_an_error() -> None:
    with pytest.raises(UserError, match=r"the radius 0\.5, the run counts at 0\.25: see at"):
        parse_certify_condition("certified@0.5<0.1").holds(summary())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("certified@<0.5", "cannot read"),
        ("certified@0.1@0.2<0.5", "cannot read"),
        ("certified", "cannot read"),
        ("certified@e<0.5", "the radius 'e' .* is no number"),
        ("correct<.", "'.' .* is no number"),
        ("certfied<0.5", "did you mean 'certified'"),
        ("correct@0.1<0.5", "has no radius: leave out @0.1"),
        ("certified@0.1<50", "for per cent write certified@0.1<50%"),
        ("mean_radius<5%", "with a plain number"),
        ("mean_radius.low<0.5", "with a plain number"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_certify_condition(text)

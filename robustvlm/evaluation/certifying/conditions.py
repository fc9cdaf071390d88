"""Conditions on a certify summary, such as `certified@0.25<50%`, that decide the exit code of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustvlm.certify import format_exact
from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.comparison import Comparison, parse_comparison
from robustvlm.runs.certify_summary import CertifySummary
from robustvlm.stats import Rate

_LEFT = re.compile(r"([a-z_]+)(?:@([0-9.eE+-]+))?")
_AT_RADIUS = ("certified", "certified_correct")
_RATES = (*_AT_RADIUS, "abstained", "correct")
_RADII = ("mean_radius", "median_radius")


@dataclass(frozen=True)
class CertifyCondition:
    """A comparison of a rate, of an end of its interval, or of a radius with a threshold.

    Example:
        >>> parse_certify_condition("certified@0.25.low < 50%").radius
        0.25
    """

    comparison: Comparison
    quantity: str
    radius: float | None

    @property
    def text(self) -> str:
        """The condition as it was written."""
        return self.comparison.text

    def holds(self, summary: CertifySummary) -> bool:
        """Whether the condition is true; of a rate over no images every condition is.

        Raises:
            UserError: the radius is none of those that the run counts at.
        """
        if self.quantity in _RADII:
            return self.comparison.holds_for(float(getattr(summary, self.quantity)))
        return self.comparison.holds_for(self._rate(summary))

    def _rate(self, summary: CertifySummary) -> Rate | None:
        if self.quantity in ("abstained", "correct"):
            found: Rate | None = getattr(summary, self.quantity)
            return found
        if self.radius is None:
            return summary.certified_correct if self.quantity == "certified_correct" else _not(summary.abstained)
        for point in summary.at:
            if point.radius == self.radius:
                return point.certified if self.quantity == "certified" else point.correct
        known = ", ".join(format_exact(point.radius) for point in summary.at)
        raise UserError(
            f"'{self.text}' asks about the radius {format_exact(self.radius)}, the run counts at {known}: see --at"
        )


def parse_certify_condition(text: str) -> CertifyCondition:
    """Return the condition of `QUANTITY[@RADIUS][.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError."""
    found = parse_comparison(text, _LEFT, example="certified@0.25<50% or mean_radius<0.1")
    match = _LEFT.fullmatch(found.left)
    assert match is not None, "the comparison was read by this pattern"
    quantity, radius = match.groups()
    if quantity not in (*_RATES, *_RADII):
        hint = nearest(quantity, [*_RATES, *_RADII])
        raise UserError(f"unknown quantity '{quantity}' in the condition '{text}': {hint}")
    if radius is not None and quantity not in _AT_RADIUS:
        raise UserError(f"'{quantity}' in the condition '{text}' has no radius: leave out @{radius}")
    if quantity in _RATES:
        found.require_share()
    elif found.part != "value" or found.percent:
        raise UserError(f"'{quantity}' in the condition '{text}' is a radius: compare it with a plain number")
    try:
        return CertifyCondition(found, quantity, None if radius is None else float(radius))
    except ValueError:
        raise UserError(f"the radius '{radius}' in the condition '{text}' is no number") from None


def _not(rate: Rate) -> Rate:
    """Return the rate of the opposite."""
    return Rate(
        successes=rate.total - rate.successes,
        total=rate.total,
        value=None if rate.value is None else 1.0 - rate.value,
        low=1.0 - rate.high,
        high=1.0 - rate.low,
        confidence=rate.confidence,
        method=rate.method,
    )

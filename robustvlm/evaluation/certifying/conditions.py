"""Conditions on a certify summary, such as `certified@0.25<50%`, that decide the exit code of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.conditions import COMPARE
from robustvlm.runs.certify_summary import CertifySummary
from robustvlm.stats import Rate

_FORM = re.compile(r"^\s*([a-z_]+)(?:@([0-9.eE+-]+))?(?:\.(low|high))?\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*(%?)\s*$")
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

    text: str
    quantity: str
    radius: float | None
    part: str
    sign: str
    threshold: float

    def holds(self, summary: CertifySummary) -> bool:
        """Whether the condition is true; a rate over no images has no value, and every condition on it counts as true.

        Raises:
            UserError: the radius is none of those that the run counts at.
        """
        if self.quantity in _RADII:
            return COMPARE[self.sign](float(getattr(summary, self.quantity)), self.threshold)
        rate = self._rate(summary)
        if rate is None or rate.value is None:
            return True
        value = {"value": rate.value, "low": rate.low, "high": rate.high}[self.part]
        return COMPARE[self.sign](value, self.threshold)

    def _rate(self, summary: CertifySummary) -> Rate | None:
        if self.quantity in ("abstained", "correct"):
            found: Rate | None = getattr(summary, self.quantity)
            return found
        if self.radius is None:
            return summary.certified_correct if self.quantity == "certified_correct" else _not(summary.abstained)
        for point in summary.at:
            if point.radius == self.radius:
                return point.certified if self.quantity == "certified" else point.correct
        known = ", ".join(f"{point.radius:g}" for point in summary.at)
        raise UserError(f"'{self.text}' asks about the radius {self.radius:g}, the run counts at {known}: see --at")


def parse_certify_condition(text: str) -> CertifyCondition:
    """Return the condition of `QUANTITY[@RADIUS][.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError."""
    match = _FORM.match(text)
    if not match:
        raise UserError(f"cannot read the condition '{text}': expected as certified@0.25<50% or mean_radius<0.1")
    quantity, radius, part, sign, number, percent = match.groups()
    if quantity not in (*_RATES, *_RADII):
        hint = nearest(quantity, [*_RATES, *_RADII])
        raise UserError(f"unknown quantity '{quantity}' in the condition '{text}': {hint}")
    if radius is not None and quantity not in _AT_RADIUS:
        raise UserError(f"'{quantity}' in the condition '{text}' has no radius: leave out @{radius}")
    try:
        at = None if radius is None else float(radius)
        threshold = float(number) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"a number in the condition '{text}' cannot be read") from None
    if quantity in _RATES and not 0 <= threshold <= 1:
        raise UserError(f"the threshold in '{text}' is outside [0, 1]: for per cent write {quantity}{sign}{number}%")
    if quantity in _RADII and (part or percent):
        raise UserError(f"'{quantity}' in the condition '{text}' is a radius: compare it with a plain number")
    return CertifyCondition(text, quantity, at, part or "value", sign, threshold)


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

"""Conditions on a summary, such as `asr>0.5`, that decide the exit code of a run in continuous integration."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from robustvlm.errors import UserError, nearest
from robustvlm.runs.summary import EpsSummary, Summary
from robustvlm.stats import Rate

_FORM = re.compile(r"^\s*([a-z_]+)(?:\.(low|high))?\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*(%?)\s*$")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_RATES = ("asr", "robust_accuracy", "clean_accuracy")


@dataclass(frozen=True)
class Condition:
    """A comparison of a rate, or of an end of its interval, with a threshold.

    Example:
        >>> parse_condition("asr.low > 50%")
        Condition(text='asr.low > 50%', rate='asr', part='low', sign='>', threshold=0.5)
    """

    text: str
    rate: str
    part: str
    sign: str
    threshold: float

    def holds(self, summary: Summary) -> bool:
        """Whether the condition is true at any eps of the run.

        A rate over no images has no value. A gate that nobody could check must not open, so every condition on it
        counts as true.
        """
        points: list[EpsSummary | None] = list(summary.per_eps) or [None]
        return any(self._holds_for(self._rate(summary, point)) for point in points)

    def _rate(self, summary: Summary, point: EpsSummary | None) -> Rate | None:
        if self.rate == "clean_accuracy":
            return summary.clean_accuracy
        if point is None:
            return None
        return point.attack_success_rate if self.rate == "asr" else point.robust_accuracy

    def _holds_for(self, rate: Rate | None) -> bool:
        if rate is None or rate.value is None:
            return True
        value = {"value": rate.value, "low": rate.low, "high": rate.high}[self.part]
        return COMPARE[self.sign](value, self.threshold)


def parse_condition(text: str) -> Condition:
    """Return the condition of a text `RATE[.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError that shows one."""
    match = _FORM.match(text)
    if not match:
        raise UserError(f"cannot read the condition '{text}': expected for example asr>0.5 or robust_accuracy.low<30%")
    rate, part, sign, number, percent = match.groups()
    if rate not in _RATES:
        raise UserError(f"unknown rate '{rate}' in the condition '{text}': {nearest(rate, _RATES)}")
    try:
        threshold = float(number) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"'{number}' in the condition '{text}' is no number") from None
    if not 0 <= threshold <= 1:
        # A rate never gets there, so a mistyped percentage would switch the check off without a word.
        raise UserError(f"the threshold in '{text}' is outside [0, 1]: for per cent write {rate}{sign}{number}%")
    return Condition(text=text, rate=rate, part=part or "value", sign=sign, threshold=threshold)

"""Conditions on an attack summary, such as `asr>0.5`, that decide the exit code of a run in continuous integration."""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustvlm.errors import UserError, nearest
from robustvlm.evaluation.comparison import Comparison, parse_comparison
from robustvlm.runs.summary import EpsSummary, Summary
from robustvlm.stats import Rate

_LEFT = re.compile(r"[a-z_]+")
_RATES = ("asr", "robust_accuracy", "clean_accuracy")


@dataclass(frozen=True)
class Condition:
    """A comparison of a rate, or of an end of its interval, with a threshold.

    Example:
        >>> parse_condition("asr.low > 50%").comparison.threshold
        0.5
    """

    comparison: Comparison

    @property
    def text(self) -> str:
        """The condition as it was written."""
        return self.comparison.text

    def holds(self, summary: Summary) -> bool:
        """Whether the condition is true at any eps of the run; of a rate over no images every condition is.

        What is undecided (a run stopped early, an attack broke) is counted both ways: a gate that nobody could check
        must not open.
        """
        points: list[EpsSummary | None] = list(summary.per_eps) or [None]
        return any(self.comparison.holds_for(found) for point in points for found in self._rates(summary, point))

    def _rates(self, summary: Summary, point: EpsSummary | None) -> list[Rate | None]:
        """Return the rate that is meant, and what it is at least and at most where something is undecided."""
        if self.comparison.left == "clean_accuracy":
            return [summary.clean_accuracy, summary.clean_accuracy_at_most or summary.clean_accuracy]
        if point is None:
            return [None]
        if self.comparison.left == "robust_accuracy":
            return [point.robust_accuracy, point.robust_accuracy_at_most or point.robust_accuracy]
        bounds = (point.attack_success_rate_at_least, point.attack_success_rate_at_most)
        return [point.attack_success_rate, *(bound for bound in bounds if bound is not None and point.undecided)]


def parse_condition(text: str) -> Condition:
    """Return the condition of a text `RATE[.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError that shows one."""
    found = parse_comparison(text, _LEFT, example="asr>0.5 or robust_accuracy.low<30%")
    if found.left not in _RATES:
        raise UserError(f"unknown rate '{found.left}' in the condition '{text}': {nearest(found.left, _RATES)}")
    found.require_share()
    return Condition(found)

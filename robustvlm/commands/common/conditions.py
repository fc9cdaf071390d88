"""What the conditions of `--fail-if` share in all commands: how a comparison is written, and when it holds."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from robustvlm.errors import UserError

_FORM = re.compile(r"\s*([^\s<>=]+?)(?:\.(low|high))?\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*(%?)\s*")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


class Bounded(Protocol):
    """A number with its interval; `value` is None where nothing was counted."""

    @property
    def value(self) -> float | None:
        """The number itself."""

    @property
    def low(self) -> float:
        """Lower end of its interval."""

    @property
    def high(self) -> float:
        """Upper end of its interval."""


@dataclass(frozen=True)
class Comparison:
    """A quantity, or an end of its interval, set against a threshold.

    Args:
        text: the comparison as it was written.
        left: what is compared, which every command reads in its own way.
        part: "value", "low" or "high"; sign: ">", "<", ">=" or "<=".
        threshold: the number, a hundredth of what was written where that was in per cent; percent: whether it was.
    """

    text: str
    left: str
    part: str
    sign: str
    threshold: float
    percent: bool = False

    def require_share(self) -> None:
        """Raise a UserError unless the threshold is one that a share of images can have."""
        if not 0 <= self.threshold <= 1:
            # A share never gets there, so a mistyped percentage would switch the check off without a word.
            meant = not self.percent and 1 < self.threshold <= 100
            hint = f": for per cent write {self.left}{self.sign}{self.threshold:g}%" if meant else ""
            raise UserError(f"the threshold in '{self.text}' is outside [0, 1]{hint}")

    def holds_for(self, found: Bounded | float | None) -> bool:
        """Whether it is true of a number.

        What has no value, or NaN, cannot be checked. A gate that nobody could check must not open, so the comparison
        counts as true then.
        """
        number = self._number(found)
        return number is None or math.isnan(number) or _COMPARE[self.sign](number, self.threshold)

    def _number(self, found: Bounded | float | None) -> float | None:
        """Return the part that is compared; None where there is no value, whatever the interval says."""
        if found is None or isinstance(found, (int, float)):
            return found
        if found.value is None or math.isnan(found.value):
            return None
        return {"value": found.value, "low": found.low, "high": found.high}[self.part]


def parse_comparison(text: str, left: re.Pattern[str], *, example: str) -> Comparison:
    """Return the comparison of a text `LEFT[.low|.high] (>|<|>=|<=) NUMBER[%]`.

    Args:
        left: what the left side may look like; example: what an error shows.

    Raises:
        UserError: the text is no such comparison.

    Example:
        >>> parse_comparison("asr.low > 50%", re.compile("[a-z]+"), example="asr>0.5")
        Comparison(text='asr.low > 50%', left='asr', part='low', sign='>', threshold=0.5, percent=True)
    """
    match = _FORM.fullmatch(text)
    if not match or not left.fullmatch(match[1]):
        raise UserError(f"cannot read the condition '{text}': expected for example {example}")
    name, part, sign, number, percent = match.groups()
    try:
        threshold = float(number) / (100 if percent else 1)
    except ValueError:
        raise UserError(f"'{number}' in the condition '{text}' is no number") from None
    return Comparison(text, name, part or "value", sign, threshold, bool(percent))

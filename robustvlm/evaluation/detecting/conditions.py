"""Conditions on a detect summary, such as `auroc:mcm@near<0.8`, that decide the exit code of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from robustvlm.detect.metrics import METRICS
from robustvlm.errors import UserError
from robustvlm.evaluation.comparison import Comparison, parse_comparison
from robustvlm.runs.detect_config import DetectConfig
from robustvlm.runs.detect_summary import OWN, OWN_SDIS, AttackedScore, DetectSummary, Measured, ScoreSummary

_LEFT = re.compile(r"([a-z0-9_]+)(?::([a-z0-9-]+|[\w.]+:[\w.]+))?(?:@([\w-]+))?")
_ATTACKED = ("auroc_intrude", "auroc_deny", "auroc_both")
_QUANTITIES = (*METRICS, *_ATTACKED)


@dataclass(frozen=True)
class DetectCondition:
    """A comparison of a metric, or of an end of its interval, with a threshold.

    Args:
        quantity: a metric of clean images, or an AUROC under attack.
        score: the score it is about, None for every score of the run.
        unknown: the set of unknown images, None for every one.

    Example:
        >>> found = parse_detect_condition("auroc:mcm@near.low < 80%")
        >>> found.quantity, found.score, found.unknown, found.comparison.part
        ('auroc', 'mcm', 'near', 'low')
    """

    comparison: Comparison
    quantity: str
    score: str | None = None
    unknown: str | None = None

    @property
    def text(self) -> str:
        """The condition as it was written."""
        return self.comparison.text

    def require(self, config: DetectConfig, *, may_refuse: bool) -> None:
        """Find out before any work whether the run will have what this asks about.

        Args:
            may_refuse: whether the model has an acceptance score of its own.

        Raises:
            UserError: it will not; the message lists what there is.
        """
        scores = config.scores + ([OWN, OWN_SDIS] if may_refuse else [])
        if self.quantity in _ATTACKED:
            if config.under_attack is None:
                raise UserError(f"'{self.text}' asks about attacked scores: pass --under-attack too")
            scores = config.under_attack.scores
        self._require_score(scores)
        self._require_set([named.name for named in config.unknown])

    def holds(self, summary: DetectSummary) -> bool:
        """Whether the condition is true of any score and set that it is about; of what has no value every one is.

        Raises:
            UserError: the run has no such score or set.
        """
        sets = [part.name for part in summary.unknown]
        self._require_set(sets)
        figures = self._figures(summary)
        reason = summary.skipped.get(self.score or "")
        if reason is not None:
            raise UserError(f"'{self.text}' asks about a score that was skipped: {reason}")
        self._require_score(list(figures))
        found = [
            values.get(name)
            for score, values in figures.items()
            for name in sets
            if self.score in (None, score) and self.unknown in (None, name)
        ]
        return not found or any(map(self.comparison.holds_for, found))

    def _figures(self, summary: DetectSummary) -> dict[str, dict[str, Measured]]:
        """Return the quantity by score and set."""
        scores: Sequence[ScoreSummary | AttackedScore]
        scores = summary.attacked if self.quantity in _ATTACKED else summary.scores
        return {score.name: {on.unknown: getattr(on, self.quantity) for on in score.on} for score in scores}

    def _require_score(self, names: Sequence[str]) -> None:
        if self.score is not None and self.score not in names:
            which = "attacks" if self.quantity in _ATTACKED else "has"
            raise UserError(
                f"'{self.text}' asks about the score '{self.score}', the run {which} {', '.join(names) or 'none'}"
            )

    def _require_set(self, names: Sequence[str]) -> None:
        if self.unknown is not None and self.unknown not in names:
            raise UserError(
                f"'{self.text}' asks about the set '{self.unknown}', the run has {', '.join(names)}: see --ood"
            )


def parse_detect_condition(text: str) -> DetectCondition:
    """Return the condition of `QUANTITY[:SCORE][@SET][.low|.high] (>|<|>=|<=) NUMBER[%]`.

    Raises:
        UserError: it cannot be read, there is no such quantity, or the threshold is outside [0, 1].
    """
    found = parse_comparison(text, _LEFT, example="auroc:mcm@near<0.8 or fpr95.high>50%")
    match = _LEFT.fullmatch(found.left)
    assert match is not None, "the comparison was read by this pattern"
    quantity, score, unknown = match.groups()
    if quantity not in _QUANTITIES:
        raise UserError(f"unknown quantity '{quantity}' in the condition '{text}': there are {', '.join(_QUANTITIES)}")
    found.require_share()
    return DetectCondition(found, quantity, score, unknown)

"""What a detect run keeps: the settings in its manifest, its `summary.json`, and the conditions put to that."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from robustvlm.detect.metrics import METRICS
from robustvlm.errors import UserError, setting
from robustvlm.runs.records import Check, Comparison, Record, UnreadableImage, parse_comparison
from robustvlm.stats import Mean, Rate

# What is read of the settings in the manifest


class NamedData(BaseModel):
    """A set of unknown images: the name that tables show, and its data spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    spec: str


class UnderAttack(BaseModel):
    """How scores are attacked.

    Args:
        scores: those that are attacked, each for its own sake.
        limit: images per set; lanes: rows of a batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scores: list[str]
    attack: list[str]
    norm: str
    eps: float
    eps_text: str
    limit: int
    lanes: int


class DetectConfig(BaseModel):
    """The settings that reports and conditions read, out of the manifest of a detect run.

    Args:
        known, fit: data of known classes, judged and learnt from; fit is None where nothing may be learnt.
        unknown: sets of unknown images. temperature: of energies, on the logits.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    known: str
    unknown: list[NamedData]
    fit: str | None
    scores: list[str]
    temperature: float = 1.0
    promise: str | None = None
    under_attack: UnderAttack | None = None


OWN = "own"
"""Name of the acceptance score of a model that may refuse, among the scores of a run."""

OWN_SDIS = "own-s-dis"
"""Name of S_DIS on the model's own prototypes and antibodies: its acceptance before thresholds of classes come off."""

KNOWN = "known"
"""Name of the set of known images."""

PROMISED = "promised"
"""What stands for a set where attacks want a wrong answer of a score with a promise."""


# The content of a detect run's `summary.json`: every number that its tables and report show


class Measured(Record):
    """A metric in [0, 1] with its 95% interval and how that was made."""

    value: float
    low: float
    high: float
    method: str


class Versus(Record):
    """How much larger the AUROC is than that of the best other baseline on the same images, by paired bootstrap.

    `p_holm` is adjusted for all scores that are compared on this set of unknown images.
    """

    baseline: str
    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float


class OnSet(Record):
    """One score on one set of unknown images; `versus` is None where there is no other score to compare it with."""

    unknown: str
    auroc: Measured
    fpr95: Measured
    aupr_in: Measured
    aupr_out: Measured
    versus: Versus | None = None


class ScoreSummary(Record):
    """One score: how it tells known images from each set of unknown ones.

    Args:
        needs: what it needs besides logits: an encoder, images of known classes, words.
        threshold: highest value that accepts 95% of the known images.
        microseconds: time per image on given features, without the encoder.
    """

    name: str
    title: str
    source: str
    needs: list[str]
    threshold: float
    microseconds: float
    on: list[OnSet]


class SetSummary(Record):
    """A set of images: its name and spec, how many were scored, and how many drawings or the like they come from."""

    name: str
    spec: str
    images: int
    groups: int
    unreadable: int


class OwnDecision(Record):
    """What a model that may refuse decides by itself, at its own threshold.

    `accepted_unknown` goes by set; `right` is the share of known images that are accepted with the right class.
    """

    accepted_known: Rate
    right: Rate
    accepted_unknown: dict[str, Rate]


class WordsSummary(Record):
    """The words outside the known classes that scores used, or the negative prompts of the model.

    Args:
        used: how many; naming: those that name a class of an unknown set, with the set's name.
        oracle: whether these were kept all the same, so that scores from words know what they are tested on.
    """

    used: int
    naming: dict[str, str]
    oracle: bool


class AttackedOnSet(Record):
    """One score on one set of unknown images, under attacks that know it.

    Args:
        auroc: clean, with unknown images attacked to be accepted, with known ones attacked to be refused, and both.
        accepted: share of the unknown images accepted, clean and attacked, at the threshold of 95% TPR.
    """

    unknown: str
    auroc_clean: Measured
    auroc_intrude: Measured
    auroc_deny: Measured
    auroc_both: Measured
    accepted_clean: Rate
    accepted_attacked: Rate


class AttackedScore(Record):
    """One score under attack: `accepted_*` are shares of the known images, at the threshold of 95% TPR."""

    name: str
    title: str
    threshold: float
    accepted_clean: Rate
    accepted_attacked: Rate
    on: list[AttackedOnSet]


class Adversarial(Record):
    """How scores tell known images from adversarial ones that were made to be misclassified, blind to the scores.

    Args:
        attacked, fooled: known images that were right, and of those the fooled ones.
        auroc: by score.
        unattacked: known images that were right and not attacked, which the fooled ones are told from; None in runs of
            before, which took wrong ones for clean as well.
    """

    attacked: int
    fooled: int
    unattacked: int | None = None
    auroc: dict[str, Measured]


class RefusedUnder(Record):
    """The known images under one corruption: the share classified right, and refused, by score."""

    name: str
    severity: int
    right: Rate
    refused: dict[str, Rate]


class CorruptedScore(Record):
    """How many of the known images a score refuses, at the threshold of 95% of the clean ones (a model's own: its own).

    Args:
        clean: without corruption. refused: over all corruptions, every kind alike; its interval is over images.
        of_right, of_wrong: of those that are still classified right, and of the others; None where there are none.
    """

    name: str
    title: str
    clean: Rate
    refused: Mean
    of_right: float | None
    of_wrong: float | None


class CorruptedKnown(Record):
    """Known images under common corruptions; severities are those defined for images of `side` pixels."""

    side: int
    images: int
    right: Mean
    scores: list[CorruptedScore]
    found: list[RefusedUnder]


class LowestClass(Record):
    """The class said with the smallest share of its answers right."""

    class_name: str
    right: Rate


class WrongAnswers(Record):
    """Shares of the attacked images that get a wrong answer, without and with attacks; without those that failed."""

    clean: Rate
    attacked: Rate


class PromisedScore(Record):
    """What one score answers under its promise, on known images that did not set its thresholds.

    Args:
        thresholds: one for all, or one for each class; None: never answered.
        answered: of the known images; right: of the answers, None without any; lowest: in the worst class said.
        unknown: the share answered of each set of unknown images, one of each group.
    """

    name: str
    title: str
    thresholds: list[float | None]
    answered: Rate
    right: Rate | None
    lowest: LowestClass | None
    unknown: dict[str, Rate]
    attacked: WrongAnswers | None = None

    @property
    def promised(self) -> int:
        """How many thresholds there are: of classes, those that are ever answered."""
        return sum(value is not None for value in self.thresholds)


class Promised(Record):
    """Answers that are right with probability `level` or more, with `confidence`: of each class, or all together.

    Args:
        calibration: known images that set the thresholds; judged: others, one of each group in both.
    """

    level: float
    confidence: float
    by_class: bool
    calibration: int
    judged: int
    scores: list[PromisedScore]


class DetectSummary(Record):
    """Everything that tables, reports and exit codes are made of.

    Args:
        known, unknown, fit: the sets of images.
        left_out: images of the known set that have none of the known classes.
        accuracy: share of known images whose class is right, whether refused or not.
        encode_ms: milliseconds per image of the encoder.
        best: name of the score with the highest mean AUROC over the sets.
        words: those that scores used, None where none did; negatives: the model's own negative prompts, likewise.
        skipped: scores that could not be used, with the reason.
    """

    known: SetSummary
    unknown: list[SetSummary]
    fit: SetSummary | None
    left_out: int
    classes: int
    accuracy: Rate
    scores: list[ScoreSummary]
    skipped: dict[str, str]
    best: str
    encode_ms: float
    own: OwnDecision | None = None
    words: WordsSummary | None = None
    negatives: WordsSummary | None = None
    attacked: list[AttackedScore] = Field(default_factory=list)
    adversarial: Adversarial | None = None
    corrupted: CorruptedKnown | None = None
    promised: Promised | None = None
    eps_text: str | None = None
    norm: str | None = None
    seconds: float
    checks: list[Check]
    unreadable: list[UnreadableImage]
    unfinished: str | None = None


# Conditions on a detect summary, such as `auroc:mcm@near<0.8`, that decide the exit code of a run

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
        >>> found = parse_condition("auroc:mcm@near.low < 80%")
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
                raise UserError(f"'{self.text}' asks about attacked scores: pass {setting('under_attack', True)} too")
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
                f"'{self.text}' asks about the set '{self.unknown}', the run has {', '.join(names)}: "
                f"see {setting('ood')}"
            )


def parse_condition(text: str) -> DetectCondition:
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

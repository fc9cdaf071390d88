"""The content of a detect run's `summary.json`: every number that its tables and report show."""

from __future__ import annotations

from pydantic import Field

from robustvlm.runs.records import Check, Record, UnreadableImage
from robustvlm.stats import Rate

OWN = "own"
"""Name of the acceptance score of a model that may refuse, among the scores of a run."""

OWN_SDIS = "own-s-dis"
"""Name of S_DIS on the model's own prototypes and antibodies: its acceptance before thresholds of classes come off."""


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
    """The words outside the known classes that scores used.

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
        attacked, fooled: known images that were right, and of those the fooled ones, which are told from the rest.
        auroc: by score.
    """

    attacked: int
    fooled: int
    auroc: dict[str, Measured]


class DetectSummary(Record):
    """Everything that tables, reports and exit codes are made of.

    Args:
        known, unknown, fit: the sets of images.
        left_out: images of the known set that have none of the known classes.
        accuracy: share of known images whose class is right, refusals left aside.
        encode_ms: milliseconds per image of the encoder.
        best: name of the score with the highest mean AUROC over the sets.
        words: those that scores used, None where none did.
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
    attacked: list[AttackedScore] = Field(default_factory=list)
    adversarial: Adversarial | None = None
    eps_text: str | None = None
    norm: str | None = None
    seconds: float
    checks: list[Check]
    unreadable: list[UnreadableImage]
    unfinished: str | None = None

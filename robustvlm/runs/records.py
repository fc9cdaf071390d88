"""What `summary.json` holds, and the records that a run's parts hand to one another."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from robustvlm.stats import Mean, Rate

Level = Literal["ok", "note", "warning", "fault"]


class Record(BaseModel):
    """What a file of a run holds: fixed once made, and nothing in it that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Images(Record):
    """How many images were evaluated, could not be read, and were classified right unperturbed.

    `exposed` are those on which the goal was not reached unperturbed (None in runs from before there were goals: the
    ones classified right); `left_out` those that the goal is not about, such as images of unknown classes; `waiting`
    those that a run which stopped early has not classified yet.
    """

    evaluated: int
    unreadable: int
    clean_correct: int
    exposed: int | None = None
    left_out: int = 0
    waiting: int = 0


class AttackSummary(Record):
    """One attack at one eps: images it ran on, fooled, broke on; accuracy left after it and all stages before it.

    `robust_accuracy_after_at_most` is that accuracy if all images that are undecided so far were robust. `passes` are
    those of the images it finished.
    """

    attack: str
    attacked: int
    fooled: int
    failed: int
    robust_accuracy_after: Rate
    robust_accuracy_after_at_most: Rate | None = None
    steps: int
    passes: int


class GroupSummary(Record):
    """A class or superclass at one eps; the rate is over its images that were right when clean and decided.

    With `undecided` images the success rate over all that were right when clean lies between `fooled` and
    `fooled + undecided` of them.
    """

    name: str
    images: int
    clean_correct: int
    fooled: int
    undecided: int = 0
    attack_success_rate: Rate


class Cosine(Record):
    """The cosine that a feature goal is about, as means over the images: unperturbed, and at the worst point found.

    For `feature` it is the similarity to the image's own clean feature (FCS), for `feature:TARGET` that to the target.
    """

    clean: Mean
    attacked: Mean


class Acceptance(Record):
    """How many images a model that may refuse accepted and rejected, unperturbed and at the recorded points."""

    clean_accepted: int
    clean_rejected: int
    accepted: int
    rejected: int


class LevelSummary(Record):
    """Accuracy at one level of a class tree, unperturbed and at the points that the attacks recorded.

    An image counts when its predicted class lies in its label's superclass, unperturbed and at every recorded point.
    `robust_accuracy_at_most` also counts the images that are not done with, as long as nothing speaks against them.
    """

    name: str
    tree: str
    level: int
    superclasses: int
    clean_accuracy: Rate
    robust_accuracy: Rate
    robust_accuracy_at_most: Rate | None = None


class TransferRow(Record):
    """What is left at every level after attacks against one of them (or all at once)."""

    goal: str
    name: str
    robust_accuracy: list[Rate]
    robust_accuracy_at_most: list[Rate] | None = None


class LevelTransfer(Record):
    """Attacks against level i (rows) scored at level j (columns); both from the classes up."""

    levels: list[str]
    clean_accuracy: list[Rate]
    rows: list[TransferRow]


class EpsSummary(Record):
    """The worst case over the attacks at one eps.

    `robust_accuracy` is over all evaluated images: the share on which the goal was reached neither unperturbed nor by
    an attack, which for `misclassify` is accuracy. `attack_success_rate` is over the images on which the goal was not
    reached unperturbed: for `misclassify` those right when clean. Images on which
    an attack broke and none succeeded, or that a stopped run has not come to (`undecided`), count as not robust, and
    are left out of the success rate. `robust_accuracy_at_most` is the robust accuracy if all of them were robust; the
    bounds of the success rate are what it is if none of them falls, and if all do.
    """

    eps: float
    eps_text: str
    fooled: int
    robust: int
    undecided: int
    robust_accuracy: Rate
    robust_accuracy_at_most: Rate | None = None
    attack_success_rate: Rate
    attack_success_rate_at_least: Rate | None = None
    attack_success_rate_at_most: Rate | None = None
    per_attack: list[AttackSummary]
    per_class: list[GroupSummary]
    per_superclass: list[GroupSummary]
    levels: list[LevelSummary] = []
    transfer: LevelTransfer | None = None
    cosine: Cosine | None = None
    acceptance: Acceptance | None = None


class Passes(Record):
    """Encoder passes by what they were made for; together they are all passes of the run.

    Args:
        images: given to images under attack, what rows and attacks count as theirs, for all goals.
        spare: rows that only filled a batch up, or whose work was lost when a session ended.
        clean: of the clean pass, and of further looks at clean images that a goal needs.
        questions: put to the model before the attacks.
        checks: of the extra attacks on a sample.
        untold: of sessions that did not tell them apart.
    """

    images: int = 0
    spare: int = 0
    clean: int = 0
    questions: int = 0
    checks: int = 0
    untold: int = 0

    @property
    def total(self) -> int:
        """All passes."""
        return self.images + self.spare + self.clean + self.questions + self.checks + self.untold


class Cost(Record, protected_namespaces=()):  # pydantic before 2.10 warns of names that begin with "model_"
    """Encoder passes (one image through the encoder once) and wall time; `model_seconds` is the part inside it.

    `passes` says what forward and backward passes were made for, and sums to both together.
    """

    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    passes_per_second: float = 0.0
    passes: Passes | None = None


class Estimate(Record):
    """What the attacks will cost at least (all images fall at the first point) and at most (all stay robust).

    Args:
        images: images still to be attacked.
        passes_least, passes_most: encoder passes, padded rows included.
        seconds_least, seconds_most: wall time on the processes of the run, from the speed of the first passes.
        unknown: attacks of other packages, whose cost is not known and comes on top.
    """

    images: int
    passes_least: int
    passes_most: int
    seconds_least: float
    seconds_most: float
    unknown: list[str] = []


class Check(Record):
    """A check of the evaluation itself, with its finding in words."""

    name: str
    level: Level
    message: str


class UnreadableImage(Record):
    """An image that could not be decoded, and why."""

    id: str
    reason: str


class Summary(Record):
    """Everything that tables, reports and exit codes are made of.

    Args:
        clean_accuracy: over the images classified and, as wrong ones, those that still wait to be.
        clean_accuracy_at_most: the same if all that wait were right; None when none waits.
        unfinished: why the run stopped before every image was decided; None when all are.
        estimate: what the attacks were expected to cost before the first of them.
    """

    norm: str
    goal: str = "misclassify"
    min_cos: float | None = None
    can_reject: bool = False
    images: Images
    clean_accuracy: Rate
    clean_accuracy_at_most: Rate | None = None
    per_eps: list[EpsSummary]
    cost: Cost
    checks: list[Check]
    unreadable: list[UnreadableImage]
    unfinished: str | None = None
    estimate: Estimate | None = None

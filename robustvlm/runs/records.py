"""What every run's summary is made of: checks, costs, estimates, images that could not be read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Level = Literal["ok", "note", "warning", "fault"]


class Record(BaseModel):
    """What a file of a run holds: fixed once made, and nothing in it that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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

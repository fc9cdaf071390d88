"""The record of a training: loss terms, validations and warnings, as plain JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from robustvlm.stats import Mean, Rate


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepEntry(_Entry):
    """Means over the steps since the entry before: `step` steps have been made, `terms` are those of the loss."""

    step: int
    terms: dict[str, float]
    learning_rate: float
    gradient_norm: float


class Validation(_Entry):
    """Measures of the weights after `step` steps; `train_loss` is the mean since the validation before."""

    step: int
    measures: dict[str, Rate | Mean | float]
    train_loss: float | None = None

    def number(self, name: str) -> float | None:
        """Return a measure as a number, None if it was not taken or has no value.

        Example:
            >>> Validation(step=0, measures={"a": 0.5}).number("a")
            0.5
        """
        found = self.measures.get(name)
        return found if found is None or isinstance(found, float) else found.value


class Warned(_Entry):
    """Something that went wrong, and after how many steps it was noticed."""

    step: int
    name: str
    message: str


class Estimate(_Entry):
    """What training and its validations will cost, or what is left of it: passes count forward and backward."""

    steps: int
    passes: int
    seconds: float


class History(BaseModel):
    """All of it; `seconds` are those inside the steps, over all sessions."""

    model_config = ConfigDict(extra="forbid")

    steps: list[StepEntry] = []
    validations: list[Validation] = []
    warnings: list[Warned] = []
    estimate: Estimate | None = None
    best_step: int | None = None
    images: int = 0
    passes: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    peak_memory: int = 0
    skipped: dict[str, str] = {}

    @property
    def images_per_second(self) -> float:
        """Training throughput, over all ranks."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def best(self) -> Validation | None:
        """Return the validation of the weights that were kept, the last one if none was better."""
        chosen = [found for found in self.validations if found.step == self.best_step]
        found = chosen or self.validations
        return found[-1] if found else None

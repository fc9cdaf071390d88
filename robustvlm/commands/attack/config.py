"""What defines an attack run, and what it reports while it works."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from robustvlm.runs.records import Estimate

# What defines an attack run: the settings that decide its results


class AttackConfig(BaseModel):
    """Every setting that the rows of an attack run depend on; a run is resumed only under an equal one.

    `goal` is what the command said, `goals` what it stands for: one goal, or for `superclass:matrix` one a level.
    `attack` names all attacks in order; the last is the `second_opinion`, where one is asked for.
    `eot` and `draws` are None where the program chooses them, once it knows whether the model is random; then
    `eot_if_random` is what a random one gets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    classes: str | None = None
    templates: str | None = None
    tree: str | None = None
    goal: str = "misclassify"
    goals: list[str] = ["misclassify"]
    min_cos: float = 0.5
    attack: list[str]
    second_opinion: str | None = None
    norm: str
    eps: list[float]
    eps_text: list[str]
    steps: int | None
    restarts: int | None
    limit: int | None
    seed: int
    lanes: int
    device: str
    precision: str
    eot: int | None = None
    eot_if_random: int = 10
    draws: int | None = None
    compiled: bool = False
    resolution: int
    save_adversarial: bool = False
    checks: str = "full"


# What an evaluation reports while it works; the command line draws it, a library user may ignore it


class Observer:
    """Receives progress and does nothing with it; override what you want to show."""

    def forecast(self, estimate: Estimate) -> None:
        """The clean pass is done; `estimate` says what is left to do."""

    def begin_stage(self, title: str, total: int | None, done: int) -> None:
        """A stage begins: `total` images in it (None: not known), `done` of them known from an earlier session."""

    def passed(self, used: int, passes: int) -> None:
        """A batched pass was made with `used` occupied rows; `passes` counts encoder passes, forward and backward."""

    def image_done(self, outcome: str | None) -> None:
        """An image of the stage is finished; `outcome` is None in the clean pass."""

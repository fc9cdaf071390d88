"""The contract between an attack and the lanes that run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from robustvlm.attacks.objectives import Objective
from robustvlm.attacks.options import MOST, Option
from robustvlm.attacks.threat import ThreatModel
from robustvlm.core.registry import Table

# Everything an attack remembers of its lanes: named tensors with the lane as first dimension. "x0" is the clean
# image and "x" the point to evaluate next; the rest is the attack's own.
State = dict[str, Tensor]

DONE = "done"


@dataclass(frozen=True, kw_only=True)
class LaneAttack(ABC):
    """An iterative attack, written as two functions of per-lane state.

    A job (one image) consists of `n_runs` sub-runs (restarts or targets); a sub-run evaluates its start and then
    `n_iter` further points. The engine evaluates all lanes in one batched pass, records successes and the best
    iterate, and calls `advance`. Both functions must treat lanes independently of each other. Fields that a user may
    set are declared with `Option`; `docs/extend.md` shows a whole attack.
    """

    # False: the attack asks for losses only, and the engine makes forward passes; `grad` is then empty.
    uses_gradient: ClassVar[bool] = True

    name: str
    n_iter: Annotated[int, Option("steps", least=1, most=MOST)]
    n_restarts: Annotated[int, Option("restarts", least=1, most=MOST)] = 1
    objective: Annotated[Objective, Option("objective")]

    def n_runs(self, n_classes: int) -> int:
        """Return how many sub-runs one image gets when the goal tells `n_classes` outcomes apart."""
        del n_classes
        return self.n_restarts

    def target_rank(self, run: int) -> int:
        """Return which of the job's target classes sub-run `run` aims at (0 = the likeliest wrong class)."""
        del run
        return 0

    @property
    def leaves_ball(self) -> bool:
        """Whether points outside the ball are asked about too; only those inside count as successes or best points."""
        return False

    def n_points(self) -> int:
        """Return how many points a sub-run evaluates at most, its start included."""
        return self.n_iter + 1

    def exhaustive(self) -> LaneAttack:
        """Return the attack without early ends that are sound for the outcome but not for the worst margin met."""
        return self

    def for_random_model(self) -> LaneAttack:
        """Return the attack without shortcuts that only hold for models that answer the same question alike."""
        return self.exhaustive()

    def away_from_image(self) -> LaneAttack:
        """Return the attack for goals whose gradient vanishes at the image: one that never starts there."""
        return self

    @abstractmethod
    def begin(self, x0: Tensor, threat: ThreatModel, generator: torch.Generator, run: int) -> State:
        """Return the state of one lane (leading dimension 1) at the start of sub-run `run`, with "x0" and "x".

        Every random draw of the sub-run comes from `generator`; draws that later steps need are made here.
        """

    @abstractmethod
    def advance(self, state: State, loss: Tensor, grad: Tensor, step: Tensor, threat: ThreatModel) -> State:
        """Return the next state, after `state["x"]` was evaluated to `loss` [L] and `grad` [L, C, H, W].

        Args:
            step: how many steps each lane's sub-run has made before this one, int64 [L].

        A bool tensor under `DONE` ends the sub-runs of the lanes where it is true.
        """


ATTACKS: Table[Callable[[], LaneAttack]] = Table(__package__)
"""How every attack of this package is made, by name: each adds itself in its own file."""

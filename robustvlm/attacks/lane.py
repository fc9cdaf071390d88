"""One occupied row of the batch: its job, its counters and the best point met so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks.base import LaneAttack
from robustvlm.attacks.jobs import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.threat import perturbation_norms

# The step number of a lane whose sub-run is over and whose next one has not begun.
RESTART = -1


@dataclass(frozen=True)
class Fact:
    """What the model says at one point: a row of an `Answer`, off the device."""

    reached: bool
    margin: float
    prediction: int
    confidence: float
    finite: bool
    cosine: float | None


@dataclass
class Lane:
    """The progress of one image through the sub-runs of an attack.

    With `leave`, the image is finished at its first success; otherwise it goes on and keeps its point of lowest margin.
    """

    job: Job
    leave: bool = True
    run: int = 0
    step: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    best_run: int = 0
    best: Fact | None = None
    best_x: Tensor | None = None

    def target(self, attack: LaneAttack) -> int:
        """Return the class that the current sub-run aims at; the label where the objective has no target."""
        if not attack.objective.targeted:
            return self.job.label
        # A lane that has closed its last sub-run may still be asked, for the second look at its recorded point.
        return self.job.targets[min(attack.target_rank(self.run), len(self.job.targets) - 1)]

    def observe(self, x: Tensor, fact: Fact) -> str | None:
        """Take in what the model says at a point [3, H, W]; return the outcome if that decides it."""
        success = fact.reached and self.leave
        if not fact.finite or success or self._improves(x, fact):
            self.best, self.best_run, self.best_x = fact, self.run, x.clone()
        if not fact.finite:
            return FAILED
        return FOOLED if success else None

    def _improves(self, x: Tensor, fact: Fact) -> bool:
        if self.best is None or self.best_x is None:
            return True
        # The point met before is no better one: several sub-runs may start at the image, and rounding differs by batch.
        return fact.margin < self.best.margin and not torch.equal(x, self.best_x)

    def reconsider(self, fact: Fact) -> str | None:
        """Replace what is known of the recorded point by a better look at it; return the outcome if that decides it."""
        self.best = fact
        return FAILED if not fact.finite else FOOLED if fact.reached else None

    def move_on(self, attack: LaneAttack, *, ended: bool) -> str | None:
        """Count a step, or close the sub-run; return the outcome when there is none left."""
        if self.step + 1 < attack.n_points() and not ended:
            self.step += 1
            self.steps += 1
            return None
        self.run += 1
        self.step = RESTART
        if self.run < attack.n_runs(len(self.job.targets) + 1):
            return None
        return FOOLED if self.best is not None and self.best.reached else ROBUST

    def result(self, outcome: str) -> Result:
        """Return the answer, measured at the recorded point."""
        assert self.best is not None, "the first point of a job lies inside the ball"
        assert self.best_x is not None
        adversarial = self.best_x.cpu()
        linf, l2 = perturbation_norms(adversarial, self.job.pixels)
        return Result(
            job=self.job,
            outcome=outcome,
            prediction=self.best.prediction if outcome != FAILED else -1,
            confidence=self.best.confidence,
            margin=self.best.margin,
            cosine=self.best.cosine,
            steps=self.steps,
            passes=self.passes,
            run=self.best_run,
            linf=linf,
            l2=l2,
            seconds=self.seconds,
            adversarial=adversarial,
        )

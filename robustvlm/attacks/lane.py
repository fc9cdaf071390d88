"""One occupied row of the batch: its job, its counters and the best point met so far."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustvlm.attacks.base import LaneAttack
from robustvlm.attacks.jobs import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.threat import perturbation_norms

# The step number of a lane whose sub-run is over and whose next one has not begun.
RESTART = -1


@dataclass
class Lane:
    """The progress of one image through the sub-runs of an attack."""

    job: Job
    run: int = 0
    step: int = 0
    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    best_run: int = 0
    best_margin: float = float("inf")
    best_logits: Tensor | None = None
    best_x: Tensor | None = None

    def target(self, attack: LaneAttack) -> int:
        """Return the class that the current sub-run aims at; the label where the objective has no target."""
        return self.job.targets[attack.target_rank(self.run)] if attack.objective.targeted else self.job.label

    def observe(self, x: Tensor, logits: Tensor, finite: bool, prediction: int, margin: float) -> str | None:
        """Take in what the model says at a point [3, H, W]; return the outcome if that decides it."""
        wrong = prediction != self.job.label
        if not finite or wrong or margin < self.best_margin:
            self.best_margin, self.best_run = margin, self.run
            self.best_x, self.best_logits = x.clone(), logits.clone()
        if not finite:
            return FAILED
        return FOOLED if wrong else None

    def best(self) -> Tensor:
        """Return the recorded point [3, H, W]."""
        assert self.best_x is not None, "a lane is evaluated before it is asked"
        return self.best_x

    def move_on(self, attack: LaneAttack, n_classes: int, *, cycle: bool) -> str | None:
        """Count a step, or close the sub-run; return "robust" when there is none left."""
        if self.step < attack.n_iter and not cycle:
            self.step += 1
            self.steps += 1
            return None
        self.run += 1
        self.step = RESTART
        return ROBUST if self.run >= attack.n_runs(n_classes) else None

    def result(self, outcome: str) -> Result:
        """Return the answer, measured at the recorded point."""
        adversarial = self.best().cpu()
        assert self.best_logits is not None
        linf, l2 = perturbation_norms(adversarial, self.job.pixels)
        prediction = int(self.best_logits.argmax().item())
        return Result(
            job=self.job,
            outcome=outcome,
            prediction=prediction if outcome != FAILED else -1,
            confidence=self.best_logits.double().softmax(0)[prediction].item(),
            margin=self.best_margin,
            steps=self.steps,
            passes=self.passes,
            run=self.best_run,
            linf=linf,
            l2=l2,
            seconds=self.seconds,
            adversarial=adversarial,
        )

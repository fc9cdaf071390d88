"""The training loop: steps, validations, checkpoints and warnings."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustvlm.training.cost import peak_memory
from robustvlm.training.data import Batch, spans
from robustvlm.training.distributed import summed
from robustvlm.training.health import warnings_of
from robustvlm.training.history import Estimate, StepEntry, Validation, Warned
from robustvlm.training.passes import counted
from robustvlm.training.schedule import learning_rate
from robustvlm.training.state import Pending, TrainingState
from robustvlm.training.stepper import Diverged, Stepper

if TYPE_CHECKING:
    from robustvlm.training.trainer import Trainer

CHECKPOINT_SECONDS = 300.0
_ENTRIES = 500


class Session:
    """One call of `fit`, from the checkpoint to the end."""

    def __init__(self, trainer: Trainer, state: TrainingState, folder: Path) -> None:
        self.t, self.state, self.folder = trainer, state, folder
        self.every = max(1, trainer.total // _ENTRIES)
        self.validate_every = trainer.config.in_steps(trainer.config.validate_every, trainer.total)
        self.warmup = trainer.config.in_steps(trainer.config.warmup, trainer.total)
        self._saved = time.monotonic()
        self._passes = 0

    def run(self) -> None:
        t, state = self.t, self.state
        t.observer.began(t.total, state.step)
        if t.config.gradient_checkpointing and not t.task.checkpoint_gradients():
            self._warn([Warned(step=0, name="gradient checkpointing", message="this model does not offer it")])
        stepper = Stepper(t.task, state, t.config, t.device)
        if state.step == 0 and not state.history.validations:
            self._validate()
        self._estimate(stepper)
        batches = self._batches(state.step, t.total)
        while state.step < t.total:
            self._advance(stepper, batches)
            done = state.step == t.total
            if done or (self.validate_every and state.step % self.validate_every == 0):
                self._validate()
            if done or self._due():
                self._save()

    def _batches(self, step: int, last: int) -> Iterator[Batch]:
        t = self.t
        return t.data.batches(
            spans(
                step=step,
                last=last,
                batch_size=t.config.batch_size,
                part=t.part,
                rank=t.ranks.rank,
                ranks=t.ranks.size,
            )
        )

    def _advance(self, stepper: Stepper, batches: Iterator[Batch]) -> None:
        t, history = self.t, self.state.history
        began = time.perf_counter()
        rate = learning_rate(
            self.state.step,
            total=t.total,
            peak=t.config.lr,
            warmup=self.warmup,
            final=t.config.final_lr,
        )
        terms = stepper.gradients(batches, self.state.step)
        shares = summed(torch.stack(list(terms.values()))) / t.ranks.size
        terms = dict(zip(terms, shares, strict=True))
        norm = stepper.advance(rate, terms)
        history.seconds += time.perf_counter() - began
        history.images += t.config.batch_size
        history.passes += self._passes
        self._note(terms, norm, rate)

    def _note(self, terms: dict[str, Tensor], norm: float, rate: float) -> None:
        """Add the terms of a step to the means of the next entry, and make the entry when it is time."""
        pending = self.state.pending
        for name, value in terms.items():
            before = pending.sums.get(name, torch.zeros_like(value))
            pending.sums[name] = before.to(value.device) + value
        pending.norms += norm
        pending.counted += 1
        step = self.state.step
        if step % self.every and step != self.t.total:
            return
        means = {name: float(total) / pending.counted for name, total in pending.sums.items()}
        entry = StepEntry(step=step, terms=means, learning_rate=rate, gradient_norm=pending.norms / pending.counted)
        self.state.history.steps.append(entry)
        self.state.pending = Pending()
        self.t.observer.stepped(step, means)

    def _validate(self) -> None:
        t, state, history = self.t, self.state, self.state.history
        began = time.perf_counter()
        with state.weights.lent(state.kept):
            t.task.module.eval()
            measures = {**t.task.validate(), **(t.validation() if t.validation else {})}
        odd = [name for name, value in measures.items() if isinstance(value, float) and not math.isfinite(value)]
        if odd:
            raise Diverged(f"after step {state.step} the {odd[0]} is not finite: lower the learning rate, or use fp32")
        history.validation_seconds += time.perf_counter() - began
        if not measures:
            return
        before = history.validations[-1].step if history.validations else 0
        losses = [entry.terms["loss"] for entry in history.steps if entry.step > before]
        found = Validation(
            step=state.step, measures=measures, train_loss=math.fsum(losses) / len(losses) if losses else None
        )
        history.validations.append(found)
        t.observer.validated(found)
        self._warn(warnings_of(history.validations))
        # The untrained weights are no candidate: a run should not end with its own beginning.
        if t.best_by is not None and state.step > 0 and self._is_best(found):
            history.best_step = state.step
            if t.ranks.leader:
                state.save_best(self.folder)
                self._save()  # at once, so that hardly anything can come between the two files

    def _is_best(self, found: Validation) -> bool:
        assert self.t.best_by is not None
        value, best = found.number(self.t.best_by), self.state.history.best()
        if value is None or self.state.history.best_step is None or best is None:
            return value is not None
        before = best.number(self.t.best_by)
        return before is None or value > before

    def _warn(self, warnings: list[Warned]) -> None:
        known = {warning.name for warning in self.state.history.warnings}
        for warning in warnings:
            if warning.name not in known:
                self.state.history.warnings.append(warning)
                self.t.observer.warned(warning)

    def _estimate(self, stepper: Stepper) -> None:
        """Count and time the gradients of one batch, without a step, and say what the rest will cost."""
        t, history, left = self.t, self.state.history, self.t.total - self.state.step
        if not left:
            return
        # Batch statistics change in a forward pass: what was there before the trial is put back.
        with self.state.weights.lent(self.state.weights.state()):
            with counted(t.task.costly()) as passes:  # pays for reading and warming up as well
                self._trial(stepper)
            if t.config.compile:
                t.task.compile()
                self._trial(stepper)
            seconds = self._trial(stepper)
        self.state.optimizer.zero_grad(set_to_none=True)
        self._passes = passes.total * t.ranks.size
        every = self.validate_every
        validations = (left // every if every else 0) + 1 if history.validations else 0
        once = history.validation_seconds / max(1, len(history.validations))
        found = Estimate(steps=left, passes=left * self._passes, seconds=left * seconds + validations * once)
        history.estimate = history.estimate or found
        t.observer.estimated(found)

    def _trial(self, stepper: Stepper) -> float:
        batches = self._batches(self.state.step, self.state.step + 1)
        began = time.perf_counter()
        stepper.gradients(batches, self.state.step)
        if self.t.device.type == "cuda":
            torch.cuda.synchronize(self.t.device)
        return time.perf_counter() - began

    def _due(self) -> bool:
        every = self.t.config.checkpoint_every
        if every:
            return self.state.step % every == 0
        return time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def _save(self) -> None:
        if not self.t.ranks.leader:
            return
        self.state.history.skipped = dict(self.t.data.skipped)
        self.state.history.peak_memory = max(self.state.history.peak_memory, peak_memory(self.t.device))
        self.state.save(self.folder)
        self._saved = time.monotonic()

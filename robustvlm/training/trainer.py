"""Training a task on images: the one public call, the loop behind it, and one step of the optimiser."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustvlm.core.files import named_disk_errors
from robustvlm.core.ranks import Ranks
from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError, is_out_of_memory, setting
from robustvlm.training.distributed import counted, peak_memory, process_group, rank_and_size, summed
from robustvlm.training.history import CLEAN, Estimate, History, StepEntry, Validation, Warned, warnings_of
from robustvlm.training.images import Batch, TrainingData, spans
from robustvlm.training.state import Pending, TrainingState
from robustvlm.training.task import Draws, Measure, Task, TrainingConfig, TrainingObserver

# One optimiser step: the parts of a batch, their gradients over all ranks, clipping, AdamW


class Diverged(UserError):
    """The loss or its gradient is no longer finite."""


class _Losses(nn.Module):
    """The task as a module: DDP averages gradients of what ran in the forward pass of a module."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.trained = task.module
        self._task = [task]

    def forward(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        return self._task[0].losses(pixels, labels, step, draws)


class Stepper:
    """Makes steps of a task; the same on every rank."""

    def __init__(self, task: Task, state: TrainingState, config: TrainingConfig, device: torch.device) -> None:
        self.task, self.state, self.config, self.device = task, state, config, device
        self.rank, self.ranks = rank_and_size()
        losses: nn.Module = _Losses(task)
        if self.ranks > 1:
            losses = DistributedDataParallel(losses)
        self._losses = losses

    def gradients(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """Leave the gradient of the next batch in the parameters; return the mean terms of this rank's share."""
        self.task.train_mode()
        # For dropout and other draws that are not ours to seed.
        torch.manual_seed(derive_seed(self.config.seed, "torch", step, self.rank))
        self.state.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in range(self.config.accumulate):
            with self._sync(last=part == self.config.accumulate - 1):
                terms = self._backward(next(batches), step)
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value / self.config.accumulate
        return totals

    def advance(self, learning_rate: float, terms: dict[str, Tensor]) -> float:
        """Clip the gradients, update weights and average, and return the gradient's norm before clipping.

        `terms` are means over all ranks, so that all of them come to the same decision.

        Raises Diverged, with the weights as they were, when loss or gradient is not finite.
        """
        parameters = self.state.weights.parameters.values()
        norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf))
        if not math.isfinite(norm) or not math.isfinite(float(terms["loss"])):
            shown = ", ".join(f"{name} {float(value):.4g}" for name, value in terms.items())
            raise Diverged(
                f"training diverged at step {self.state.step + 1} ({shown}; gradient norm {norm:g}): "
                "lower the learning rate, lengthen the warm-up, or use fp32; the last checkpoint is kept"
            )
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate
        self.state.optimizer.step()
        self.state.step += 1
        if self.state.average is not None:
            self.state.average.update(self.state.step)
        return norm

    def _backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        draws = Draws(self.config.seed, step, batch.ids, device=self.device)
        try:
            pixels, labels = (t.to(self.device, non_blocking=True) for t in (batch.pixels, batch.labels))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                terms = self._losses(pixels, labels, step, draws)
            (terms["loss"] / self.config.accumulate).backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"memory ran out with {len(batch.ids)} images at once: cut the batch into more parts "
                f"({setting('accumulate', 2 * self.config.accumulate)}), or train with "
                f"{setting('gradient_checkpointing', True)}"
            ) from error
        return {name: value.detach().float() for name, value in terms.items()}

    def _sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients once a batch, with its last part."""
        if last or not isinstance(self._losses, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._losses.no_sync()


# Learning rates over the steps


def learning_rate(step: int, *, total: int, peak: float, warmup: int = 0, final: float = 0.0) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine from `peak` to `final` * peak.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5, without restarts.

    Example:
        >>> [round(learning_rate(s, total=6, peak=1.0, warmup=2), 3) for s in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))


# The training loop: steps, validations, checkpoints and warnings

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
                step=step, last=last, batch_size=t.config.batch_size, part=t.part, rank=t.ranks.rank, ranks=t.ranks.size
            )
        )

    def _advance(self, stepper: Stepper, batches: Iterator[Batch]) -> None:
        t, history = self.t, self.state.history
        began = time.perf_counter()
        rate = learning_rate(
            self.state.step, total=t.total, peak=t.config.lr, warmup=self.warmup, final=t.config.final_lr
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
        """Whether weights are better than the best so far; of equally robust ones, those more right when clean."""
        assert self.t.best_by is not None
        value, best = found.number(self.t.best_by), self.state.history.best()
        if value is None or self.state.history.best_step is None or best is None:
            return value is not None
        before = best.number(self.t.best_by)
        return before is None or (value, found.number(CLEAN) or 0.0) > (before, best.number(CLEAN) or 0.0)

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


# Training a task on images: the one public call


class Trainer:
    """Trains the module of a task; killed at any moment, the same call goes on and ends with the same weights.

    On the CPU a resumed run equals a straight one bit for bit; several ranks equal one up to the order of sums.

    Args:
        task: what is trained, on its device; data: the images; config: how.
        validation: measures beside those of the task, called under the weights that would be kept.
        best_by: the measure to keep the best weights by; default: the task's.
        ranks: the processes of the job; observer: told of the progress, on rank 0.

    Example:
        >>> import tempfile
        >>> from robustvlm.data import open_data
        >>> from robustvlm.training import TrainingImages
        >>> class Brightness(Task):
        ...     def losses(self, pixels, labels, step, draws):
        ...         return {"loss": (self.module(pixels.flatten(1))[:, 0] - pixels.mean((1, 2, 3))).square().mean()}
        >>> images = TrainingImages(open_data("emoji?split=train&copies=1"), size=8, seed=0, limit=64)
        >>> task = Brightness(torch.nn.Linear(192, 1))
        >>> config = TrainingConfig(steps=30, batch_size=32, lr=0.01)
        >>> history = Trainer(task, images, config).fit(Path(tempfile.mkdtemp()))
        >>> history.steps[-1].terms["loss"] < history.steps[0].terms["loss"]
        True
    """

    def __init__(
        self,
        task: Task,
        data: TrainingData,
        config: TrainingConfig,
        *,
        validation: Callable[[], Mapping[str, Measure]] | None = None,
        best_by: str | None = None,
        ranks: Ranks | None = None,
        observer: TrainingObserver | None = None,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.validation, self.best_by = validation, best_by or task.best_by
        self.ranks = ranks or Ranks()
        self.observer = (observer if self.ranks.leader else None) or TrainingObserver()
        self.total = config.total_steps(len(data))
        self.device = next(task.module.parameters()).device
        self.part = config.part_size(self.ranks.size)

    def fit(self, folder: Path, *, run: str | None = None) -> History:
        """Train to the last step, with checkpoints in `folder`; leave the best weights in the module.

        Args:
            run: identity of the run, which the checkpoints carry; those of another one are refused.

        Raises:
            UserError: divergence, a checkpoint made under other settings, no memory, a full disk, a failed peer.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with named_disk_errors(folder), process_group(self.ranks, self.device), torch.random.fork_rng(devices):
            state = TrainingState(self.task.module, self.config, images=len(self.data), run=run)
            state.load(folder)
            Session(self, state, folder).run()
            self.ranks.barrier()
            state.load_kept(folder)
            self.task.module.eval()
        return state.history

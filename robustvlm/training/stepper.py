"""One optimiser step: the parts of a batch, their gradients over all ranks, clipping, AdamW."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustvlm.core.memory import is_out_of_memory
from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError
from robustvlm.training.config import TrainingConfig
from robustvlm.training.data import Batch
from robustvlm.training.distributed import rank_and_size
from robustvlm.training.draws import Draws
from robustvlm.training.state import TrainingState
from robustvlm.training.task import Task


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
                f"(--accumulate {2 * self.config.accumulate}), or train with --gradient-checkpointing"
            ) from error
        return {name: value.detach().float() for name, value in terms.items()}

    def _sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients once a batch, with its last part."""
        if last or not isinstance(self._losses, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._losses.no_sync()

"""Learning the context vectors on cached image features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.defenses.prompts.energy import tuning_loss
from robustvlm.defenses.prompts.learner import PromptLearner
from robustvlm.errors import UserError


@dataclass(frozen=True)
class TuneSettings:
    """How prompts are learnt; `weight` is lambda of the energy term, None for CoOp without the EBM terms.

    Raises:
        UserError: a value out of range.
    """

    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.01
    weight: float | None = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"the learning rate must be positive, got {self.lr:g}: pass for example 0.01")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise UserError(f"the weight of the energy term must be at least 0, got {self.weight:g}: pass 1")


def tune(
    learner: PromptLearner,
    features: Tensor,
    labels: Tensor,
    *,
    scale: float,
    settings: TuneSettings,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Learn the context of `learner` in place; return the mean terms of each epoch.

    Adam with a cosine schedule; the order of the images is drawn by (seed, epoch). Only the context changes.

    Args:
        features: unit image features [N, D] of known images, labels [N].
        scale: factor on cosines.

    Raises:
        UserError: the loss is no longer finite.
    """
    optimizer = torch.optim.Adam(learner.parameters(), lr=settings.lr)
    per_epoch = -(-len(features) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * per_epoch)
    device = learner.context.device
    history: list[dict[str, float]] = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator(settings.seed, "prompt order", epoch))
        sums: dict[str, float] = {}
        for chosen in order.split(settings.batch_size):
            batch, wanted = features[chosen].to(device), labels[chosen].to(device)
            terms = tuning_loss(batch, wanted, learner(), scale=scale, weight=settings.weight)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            schedule.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(chosen) / len(features)
        if not all(abs(value) < float("inf") for value in sums.values()):
            raise UserError(
                f"the loss is {sums['loss']} in epoch {epoch + 1}: pass a smaller --lr than {settings.lr:g}"
            )
        history.append(sums)
        if on_epoch is not None:
            on_epoch(epoch + 1, sums)
    return history

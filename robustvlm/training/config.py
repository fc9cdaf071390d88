"""The settings of the engine, whatever it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robustvlm.errors import UserError, nearest

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every setting of the engine that decides the weights, and how often it validates and stores them.

    Args:
        steps, epochs: how long to train; one of them. An epoch is one pass over the images.
        batch_size: images per optimiser step, over all ranks and accumulated parts.
        lr: peak learning rate of AdamW; it rises over `warmup` steps and falls along half a cosine to `final_lr` * lr.
        warmup: in steps; below 1, a share of all steps.
        weight_decay: of matrices and filters; vectors (biases, norms, scales) are never decayed.
        betas: of AdamW.
        clip: largest norm of the gradient; None: as it is.
        accumulate: parts that a batch is cut into (on every rank), one after the other, to save memory.
        precision: "fp32", or "bf16" for autocast around `Task.losses`; weights and perturbations stay float32.
        ema: decay of the moving average of the weights, which then is what is validated and kept; None: none.
        compile, gradient_checkpointing: see `Task.compile` and `Task.checkpoint_gradients`.
        seed: of every draw.
        validate_every: in steps, below 1 as a share of all steps; the last step always validates. 0: it alone.
        checkpoint_every: in steps; 0: every five minutes. The last step always writes one.

    Raises:
        UserError: values out of range.

    Example:
        >>> TrainingConfig(epochs=2, batch_size=50).total_steps(images=130)
        6
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    lr: float = 1e-5
    final_lr: float = 0.0
    warmup: float = 0.05
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float | None = 1.0
    accumulate: int = 1
    precision: str = "fp32"
    ema: float | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    validate_every: float = 0.1
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("say how long to train, either in steps or in epochs (--steps or --epochs)")
        for name, value in (("epochs", self.epochs), ("the learning rate", self.lr), ("clip", self.clip)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, got {value}")
        for name, count in (
            ("steps", self.steps),
            ("the batch size", self.batch_size),
            ("accumulate", self.accumulate),
        ):
            if count is not None and count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        for name, least in (("warmup", 0), ("seed", 0), ("validate_every", 0), ("checkpoint_every", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must not be negative, and must be finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"the weight decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"final_lr is a share of the learning rate, between 0 and 1, got {self.final_lr}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"the decay of the moving average must lie between 0 and 1, got {self.ema}: pass 0.999")
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown precision '{self.precision}': {nearest(self.precision, PRECISIONS)}")

    def total_steps(self, images: int) -> int:
        """Return the number of optimiser steps over a set of so many images."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 0) * images / self.batch_size))

    def in_steps(self, value: float, total: int) -> int:
        """Return a number of steps that may be given as a share of all `total` steps.

        Example:
            >>> config = TrainingConfig(steps=200)
            >>> config.in_steps(0.05, 200), config.in_steps(30, 200)
            (10, 30)
        """
        return round(value * total) if value < 1 else int(value)

    def part_size(self, ranks: int) -> int:
        """Return how many images one rank sees at once; raise UserError where the batch cannot be cut evenly."""
        parts = ranks * self.accumulate
        if self.batch_size % parts:
            shares = f"{ranks} process(es) x {self.accumulate} part(s)"
            raise UserError(f"the batch size {self.batch_size} cannot be cut into {shares}: pass a multiple of {parts}")
        return self.batch_size // parts

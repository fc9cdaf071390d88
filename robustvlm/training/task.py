"""What is trained: a module and the loss of a batch, the engine's settings, a step's draws, and who watches."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.core.seeds import derive_seed, generator
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.stats import Mean, Rate
from robustvlm.training.history import Estimate, Validation, Warned

# Random numbers of one training step that belong to images, not to batches

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Draws:
    """The random numbers of one step: those of an image depend on the run's seed, the step and the image's id alone.

    So they are the same whether the batch is cut into ranks or accumulated parts, or not cut at all, and the same on
    every device. `generator()` is for draws that concern the whole step; it is the same on every rank.

    Args:
        seed: of the run; step: number of the step; ids: of the images, one a row.
        device: where the numbers are wanted.

    Example:
        >>> draws = Draws(0, 7, ["a", "b"])
        >>> whole = draws.uniform(torch.empty(2, 3, 4, 4))
        >>> alone = Draws(0, 7, ["b"]).uniform(torch.empty(1, 3, 4, 4))
        >>> torch.equal(whole[1:], alone)
        True
    """

    def __init__(self, seed: int, step: int, ids: Sequence[str], *, device: str | torch.device = "cpu") -> None:
        self.seed, self.step, self.ids = seed, step, tuple(ids)
        self.device = torch.device(device)

    def generator(self, name: str = "") -> torch.Generator:
        """Return a CPU generator for draws that concern the step as a whole."""
        return generator(self.seed, "step", self.step, name)

    def uniform(self, like: Tensor, name: str = "") -> Tensor:
        """Return float32 numbers in [0, 1) of the shape of `like` [B, ...], row i from the stream of image i.

        `name` tells several draws of one step apart. Source of the stream: a counter put through the finaliser of
        SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), 24 bits of each result.
        """
        bits = self._bits(like[0].numel(), name)
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).view(like.shape)

    def normal(self, like: Tensor, name: str = "") -> Tensor:
        """Return float32 standard normal numbers of the shape of `like` [B, ...], row i from the stream of image i."""
        bits = self._bits(like[0].numel(), name)
        # 52 bits, centred in their cell, so that neither tail is cut short of 8 standard deviations.
        uniform = ((bits >> 12) & (2**52 - 1)).to(torch.float64).add_(0.5).mul_(2.0**-52)
        return torch.special.ndtri(uniform).to(self.device, torch.float32).view(like.shape)

    def _bits(self, count: int, name: str) -> Tensor:
        """Return 64 random bits per number, int64 [B, count]."""
        seeds = [derive_seed(self.seed, "image", self.step, image, name) for image in self.ids]
        start = torch.tensor(seeds, dtype=torch.int64, device=self.device)[:, None]
        return _mixed(start + _GOLDEN * torch.arange(1, count + 1, dtype=torch.int64, device=self.device))


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap as those of unsigned numbers do."""
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; `>>` alone would fill with the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


# What is trained: a module and the loss of a batch

Measure = Rate | Mean | float


class Task(ABC):
    """A training task: the engine asks it for losses, validates it now and then, and stores what it trains.

    A task implements `losses`; all else has a default. The engine trains the parameters of `module` that require
    gradients when `Trainer` is made, and stores those and the module's buffers, nothing else: frozen parts come from
    the base model. Everything random is drawn from `draws`, so that a run does not depend on how batches are cut.

    Args:
        module: what is trained, on the device where it is to be trained.

    Example:
        >>> import torch
        >>> class Fit(Task):
        ...     def losses(self, pixels, labels, step, draws):
        ...         error = (self.module(pixels.flatten(1)) - 1).square().mean()
        ...         return {"loss": error, "rmse": error.sqrt()}
        >>> task = Fit(nn.Linear(12, 1))
        >>> sorted(task.losses(torch.rand(2, 3, 2, 2), torch.zeros(2), 0, Draws(0, 0, ["a", "b"])))
        ['loss', 'rmse']
    """

    labelled = True
    """Whether `losses` reads labels; if not, images of unknown classes are trained on as well."""

    best_by: str | None = None
    """The measure of `validate` by which the best weights are kept, the larger the better; None: keep the last."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @abstractmethod
    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        """Return the terms of the loss as scalars; the one named "loss" is minimised, the others are recorded.

        Every term is a mean over the images given, so that the mean over ranks or accumulated parts is that of the
        whole batch; terms that compare images with each other use `distributed.gathered` first. Gradients of an
        inner attack are taken by `torch.autograd.grad` for the pixels, never by `backward`.

        Args:
            pixels: augmented images [B, 3, S, S] in [0, 1], on the module's device, float32.
            labels: int64 [B]; -1 (unknown class) appears only if `labelled` is False.
            step: number of the optimiser step, from 0.
            draws: random numbers of the step, per image.
        """

    def train_mode(self) -> None:
        """Put the module into the mode that it trains in; called before every step.

        Default: evaluation mode, in which batch normalisation keeps its statistics and dropout is off, so that the
        inner attack and the step see one function.
        """
        self.module.eval()

    def validate(self) -> Mapping[str, Measure]:
        """Return measures of the present weights by name; called on every rank, the answer of rank 0 counts.

        Some names have a meaning (see `robustvlm.training.history`): "clean accuracy", "robust accuracy",
        "FGSM accuracy", "noise accuracy", "feature spread".
        """
        return {}

    def costly(self) -> nn.Module:
        """Return the part whose forward and backward passes are counted as the cost; the whole module by default."""
        return self.module

    def compile(self) -> None:
        """Compile the costly part in place (`TrainingConfig.compile`)."""
        self.module.compile()

    def checkpoint_gradients(self) -> bool:
        """Recompute activations in the backward pass to save memory; return whether the module can."""
        return False


# The settings of the engine, whatever it trains

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
            raise UserError(
                "say how long to train, either in steps or in epochs: "
                f"pass {setting('steps', 'N')} or {setting('epochs', 'N')}"
            )
        for name, value in (("epochs", self.epochs), ("lr", self.lr), ("clip", self.clip)):
            if value is not None and not 0 < value < math.inf:
                raise BadSetting(name, "must be a positive number", got=value)
        for name, count in (
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("accumulate", self.accumulate),
        ):
            if count is not None and count < 1:
                raise BadSetting(name, "must be at least 1", got=count)
        for name, least in (("warmup", 0), ("seed", 0), ("validate_every", 0), ("checkpoint_every", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise BadSetting(name, "must not be negative, and must be finite", got=getattr(self, name))
        if not 0 <= self.weight_decay < math.inf:
            raise BadSetting("weight_decay", "must not be negative, and must be finite", got=self.weight_decay)
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"final_lr is a share of the learning rate, between 0 and 1, got {self.final_lr}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise BadSetting("ema", "must lie between 0 and 1", got=f"{self.ema}: pass 0.999")
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


# Who wants to know how training goes


class TrainingObserver:
    """Told of everything on rank 0; does nothing by itself.

    Example:
        >>> TrainingObserver().began(total=10, done=0)
    """

    def began(self, total: int, done: int) -> None:
        """Training begins, or goes on after `done` of `total` steps."""

    def estimated(self, estimate: Estimate) -> None:
        """What it will cost, measured on a first batch."""

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        """`step` steps are made; `terms` are the latest means of the loss."""

    def validated(self, found: Validation) -> None:
        """The weights were validated."""

    def warned(self, warning: Warned) -> None:
        """Something goes wrong."""

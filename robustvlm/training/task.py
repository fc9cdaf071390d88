"""What is trained: a module and the loss of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from robustvlm.stats import Mean, Rate
from robustvlm.training.draws import Draws

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

        Some names have a meaning (see `robustvlm.training.health`): "clean accuracy", "robust accuracy",
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

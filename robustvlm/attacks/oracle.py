"""The model as attacks see it: logits and input gradients of full batches, every pass counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Case, Goal
from robustvlm.attacks.objectives import Objective
from robustvlm.attacks.tally import Answer, Tally
from robustvlm.core.seeds import derive_seed
from robustvlm.errors import UserError, nearest
from robustvlm.models.borrowed import borrowed, placed
from robustvlm.models.boundary import Boundary
from robustvlm.models.device import full_precision_kernels

PRECISIONS = ("fp32", "bf16", "fp64")

# A model under attack: pixels [B, 3, H, W] in [0, 1] to outputs [B, O].
Logits = Callable[[Tensor], Tensor]


@dataclass
class Passes:
    """Encoder passes spent, in images (a padded row costs as much as a used one), and the seconds inside the model."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


class Oracle:
    """Answers and input gradients of a model, at a stated precision, with passes and time counted.

    Args:
        model: module from pixels [B, 3, H, W] in [0, 1] to outputs [B, O]; it is in evaluation mode and frozen during
            a pass, and left as it was. One on another device or in another precision is copied here, as it is now.
        device: where the passes run.
        precision: "fp32"; "bf16" for gradients under autocast (answers are confirmed in fp32); "fp64" to check.
        eot: draws of a random model over which losses and gradients are averaged (expectation over transformation,
            Athalye et al. 2018, arXiv 1707.07397), one after the other, so that memory does not grow with them.
        draws: fresh draws of a random model that judge a point, by majority.
        seed: of the model's own draws.
        compiled: take gradients from a `torch.compile`d copy; the plain model confirms.

    Example:
        >>> oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> oracle.confirm(torch.rand(5, 3, 2, 2)).shape, oracle.passes.forward
        (torch.Size([5, 3]), 5)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        eot: int = 1,
        draws: int = 1,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")
        self.precision = precision
        self.device = torch.device(device)
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.model = placed(model, self.device, self.dtype)
        self.layout = _layout(model)
        self.eot, self.draws, self.seed = eot, draws, seed
        self.passes = Passes()
        self._plain = Boundary(self.model, what="the model", parts=self.model)
        self._fast = (
            Boundary(torch.compile(self.model), what="the model", parts=self.model) if compiled else self._plain
        )
        self._drawn = 0

    @property
    def confirmed(self) -> bool:
        """Whether an answer that comes with a gradient is final, so that it needs no second look."""
        return self.precision != "bf16" and self.eot == self.draws == 1 and self._fast is self._plain

    @property
    def look_passes(self) -> int:
        """Forward passes that one look takes per image."""
        return self.eot

    def confirm(self, x: Tensor) -> Tensor:
        """Return full-precision outputs [B, O] of images [B, 3, H, W], one draw of a random model."""
        with self._counted(len(x), backward=False), self._drawing(), torch.no_grad():
            return self.outputs(x).detach()

    def outputs(self, x: Tensor) -> Tensor:
        """Return the model's outputs [B, O] for images on any device; uncounted, and with a gradient if `x` has one.

        The model gets a copy of the images, which it may change in place; its outputs are in float32 at least.
        """
        return self._ask(self._plain, x.to(self.device, self.dtype, memory_format=self.layout))

    def _ask(self, boundary: Boundary, x: Tensor) -> Tensor:
        with borrowed(self.model):
            return boundary(x)

    def judge(self, x: Tensor, goal: Goal, case: Case) -> Answer:
        """Return the answers that decide outcomes: full precision, `draws` fresh draws of a random model."""
        tally = Tally(goal, case, len(x), self.device)
        for _ in range(self.draws):
            tally.add(self.confirm(x))
        return tally.answer()

    def look(
        self, x: Tensor, goal: Goal, objective: Objective, case: Case, *, gradient: bool = True
    ) -> tuple[Answer, Tensor, Tensor]:
        """Return answers, losses [B] and their gradients [B, 3, H, W] (empty without `gradient`), averaged over `eot`.

        A gradient that is not finite is returned as zero: a step along it would lose the image.
        """
        tally = Tally(goal, case, len(x), self.device)
        loss_sum, grad_sum = x.new_zeros(len(x), device=self.device), x.new_zeros(0, device=self.device)
        for _ in range(self.eot):
            output, loss, grad = self._pass(x, lambda out: goal.loss(out, objective, case), gradient=gradient)
            tally.add(output)
            loss_sum = loss_sum + loss
            grad_sum = grad if not len(grad_sum) else grad_sum + grad
        return tally.answer(), loss_sum / self.eot, grad_sum / self.eot

    def gradient(self, x: Tensor, objective: Objective, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs [B, O], losses [B] and input gradients of an objective on the logits; one draw."""
        return self._pass(x, lambda output: objective(output, label, target), gradient=True)

    def _pass(self, x: Tensor, loss_of: Callable[[Tensor], Tensor], *, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().to(memory_format=self.layout, copy=True).requires_grad_(gradient)
        with self._counted(len(x), backward=gradient), self._drawing(), torch.set_grad_enabled(gradient):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                output = self._ask(self._fast, x)
            output = output.to(self.dtype)
            loss = loss_of(output)
            # Rows do not interact, so the gradient of the sum holds every image's own gradient.
            grad = torch.autograd.grad(loss.sum(), x)[0] if gradient else x.new_zeros(0)
        grad = torch.nan_to_num(grad.contiguous(), nan=0.0, posinf=0.0, neginf=0.0)
        return output.detach(), loss.detach(), grad

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Give a random model fresh draws that follow from the seed; the caller's random state is left alone."""
        self._drawn += 1
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(derive_seed(self.seed, "draws of the model", self._drawn))
            yield

    @contextlib.contextmanager
    def _counted(self, images: int, *, backward: bool) -> Iterator[None]:
        start = time.perf_counter()
        with full_precision_kernels():
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.passes.seconds += time.perf_counter() - start
        self.passes.forward += images
        self.passes.backward += images if backward else 0


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels last for convolutional encoders, whose kernels are faster on it; the default for others."""
    spatial = [part for part in model.modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    # A transformer has one such layer, which cuts the image into patches; a convolutional encoder has many.
    return torch.channels_last if len(spatial) > 3 else torch.contiguous_format

"""The model as attacks see it: logits and input gradients of full batches, every pass counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustvlm.attacks.objectives import Objective
from robustvlm.errors import UserError, nearest

PRECISIONS = ("fp32", "bf16", "fp64")

# A model under attack: pixels [B, 3, H, W] in [0, 1] to logits [B, K].
Logits = Callable[[Tensor], Tensor]


@dataclass
class Passes:
    """Encoder passes spent, in images (a padded row costs as much as a used one), and the seconds inside the model."""

    forward: int = 0
    backward: int = 0
    seconds: float = 0.0


class Oracle:
    """Logits and input gradients of a model, at a stated precision, with passes and time counted.

    Args:
        model: module from pixels [B, 3, H, W] in [0, 1] to logits [B, K]; put into eval mode, parameters frozen.
        device: where the passes run.
        precision: "fp32"; "bf16" for gradients under autocast (answers are confirmed in fp32); "fp64" to check.

    Example:
        >>> oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> oracle.confirm(torch.rand(5, 3, 2, 2)).shape, oracle.passes.forward
        (torch.Size([5, 3]), 5)
    """

    def __init__(self, model: nn.Module, *, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")
        self.precision = precision
        self.device = torch.device(device)
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.model = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.layout = _layout(model)
        self.model.to(memory_format=self.layout)
        self.passes = Passes()

    @property
    def confirmed(self) -> bool:
        """Whether the logits that come with a gradient are full precision already, so that they need no second look."""
        return self.precision != "bf16"

    def confirm(self, x: Tensor) -> Tensor:
        """Return full-precision logits [B, K] of images [B, 3, H, W]; the only logits that decide an outcome."""
        with self._counted(len(x), backward=False), torch.no_grad():
            return self.model(x.to(self.device, self.dtype, memory_format=self.layout)).detach()

    def gradient(self, x: Tensor, objective: Objective, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, K], losses [B] and their gradients with respect to the pixels [B, 3, H, W].

        A gradient that is not finite is returned as zero: a step along it would lose the image.
        """
        x = x.detach().to(memory_format=self.layout, copy=True).requires_grad_(True)
        with self._counted(len(x), backward=True), torch.enable_grad():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                logits = self.model(x)
            logits = logits.to(self.dtype)
            loss = objective(logits, label, target)
            # Rows do not interact, so the gradient of the sum holds every image's own gradient.
            (grad,) = torch.autograd.grad(loss.sum(), x)
        grad = torch.nan_to_num(grad.contiguous(), nan=0.0, posinf=0.0, neginf=0.0)
        return logits.detach(), loss.detach(), grad

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


@contextlib.contextmanager
def full_precision_kernels() -> Iterator[None]:
    """Run float32 as float32 (no TF32) with reproducible cuDNN kernels, and restore the caller's settings."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before

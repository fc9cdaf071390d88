"""The model as a published package sees it: an ordinary module whose every pass we count."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustvlm.attacks.oracle import Oracle
from robustvlm.models.device import full_precision_kernels


class Watched(nn.Module):
    """Pixels [B, 3, H, W] in [0, 1] to float32 logits [B, K], always in evaluation mode, passes counted in the oracle.

    `permit` is asked before every pass, `on_pass` told after it. The model itself is hidden from the package: changing
    the wrapper's mode or weights cannot reach it.

    Example:
        >>> oracle = Oracle(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
        >>> model = Watched(oracle).train()
        >>> x = torch.rand(5, 3, 2, 2, requires_grad=True)
        >>> model(x).sum().backward()
        >>> model.training, oracle.passes.forward, oracle.passes.backward
        (False, 5, 5)
    """

    def __init__(
        self,
        oracle: Oracle,
        on_pass: Callable[[int, int], None] | None = None,
        permit: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._hidden = (oracle,)
        self._on_pass, self._permit = on_pass, permit
        self.refusal: Exception | None = None
        # Packages ask for the device of the first parameter.
        self.anchor = nn.Parameter(torch.empty(0, device=oracle.device), requires_grad=False)
        self.training = False

    def train(self, mode: bool = True) -> Watched:
        """Stay in evaluation mode: torchattacks switches to whatever mode it found."""
        del mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        (oracle,) = self._hidden
        self._ask(len(x) * (2 if x.requires_grad and torch.is_grad_enabled() else 1))
        began, ended = time.perf_counter(), [0.0]
        # A view, so that a hook can tell when the backward pass has come back to the pixels.
        x = x.view_as(x)
        with full_precision_kernels():
            logits: Tensor = oracle.outputs(x).float()
        self._count(len(x), began, backward=False)
        if logits.requires_grad:
            logits.register_hook(lambda _: ended.__setitem__(0, time.perf_counter()))
            x.register_hook(lambda grad: self._count(len(grad), ended[0], backward=True))
        return logits

    def _ask(self, passes: int) -> None:
        try:
            if self._permit is not None:
                self._permit(passes)
        except Exception as error:
            self.refusal = error
            raise

    def _count(self, images: int, began: float, *, backward: bool) -> None:
        (oracle,) = self._hidden
        if oracle.device.type == "cuda":
            torch.cuda.synchronize(oracle.device)
        oracle.passes.seconds += time.perf_counter() - began
        oracle.passes.forward += 0 if backward else images
        oracle.passes.backward += images if backward else 0
        if self._on_pass is not None:
            self._on_pass(images, images)

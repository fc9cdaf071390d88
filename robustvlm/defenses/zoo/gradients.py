"""Parts of gradient modes: gates that are leant on, attention with a second derivative."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def leaning(output: Tensor, hinge: Tensor, weight: float = 1.0) -> Tensor:
    """Return `output` [B, K] to the bit, with a gradient that also lowers `hinge` [B] while it is positive.

    For gates: an attack that raises a loss of the output is led to the side of the gate where the hinge is zero. The
    pull is `weight` times the size of the loss's own gradient with respect to the row's output.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> y = leaning(x, x.sum(1))
        >>> torch.autograd.grad(y[:, 0].sum(), x)[0].tolist()
        [[0.0, -1.0]]
    """
    return _Leaning.apply(output, hinge.clamp_min(0), weight)


class _Leaning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, hinge: Tensor, weight: float) -> Tensor:
        del hinge
        ctx.weight = weight
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad = grads[0]
        return grad, -ctx.weight * grad.flatten(1).norm(dim=1), None


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention in its plain form, which has a second derivative; fused kernels have none. Settings are restored.

    A defence whose inner steps take gradients uses it for them in every mode, so that all modes compute the same bits.
    """
    backends = torch.backends.cuda  # whose switches hold for the CPU's kernels as well
    before = (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled())
    try:
        backends.enable_flash_sdp(False)
        backends.enable_mem_efficient_sdp(False)
        backends.enable_math_sdp(True)
        yield
    finally:
        backends.enable_flash_sdp(before[0])
        backends.enable_mem_efficient_sdp(before[1])
        backends.enable_math_sdp(before[2])

"""Parts of gradient modes: attacks that are steered to one side of a gate, attention with a second derivative."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from robustvlm.attacks.threat import per_image

P = ParamSpec("P")
T = TypeVar("T")

_TINY = 1e-12
"""Below this length a gradient has no direction."""


class Steering:
    """Pixels whose gradient, on its way back, is joined by a pull of the same length towards one side of a gate.

    An attack that raises a loss of what is made of `pixels` is led to where the hinge is zero. The pull has the length
    of the loss's own gradient, image by image: of a gate on cosines it would be a hundredth of that otherwise, as
    logits are scaled and the hinge is not.

    Args:
        pixels: [B, 3, H, W].

    Attributes:
        pixels: the same to the bit; what the gate and the answer are to be computed from.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> steering = Steering(x)
        >>> steering.lower(steering.pixels[:, 1])
        >>> torch.autograd.grad(3 * steering.pixels[:, 0].sum(), x)[0].tolist()
        [[3.0, -3.0]]
    """

    def __init__(self, pixels: Tensor) -> None:
        self._pull = _Pull()
        self.pixels: Tensor = pixels
        if torch.is_grad_enabled() and pixels.requires_grad:
            self.pixels = _Steered.apply(pixels, self._pull)

    def lower(self, hinge: Tensor) -> None:
        """Lead to where `hinge` [B], computed from `pixels`, is zero or below; images that are there are left alone."""
        if self.pixels.grad_fn is None or not hinge.requires_grad:
            return
        (grad,) = torch.autograd.grad(hinge.clamp_min(0).sum(), self.pixels, retain_graph=True)
        self._pull.direction = grad / per_image(grad.flatten(1).norm(dim=1).clamp_min(_TINY), grad)


class _Pull:
    """A direction [B, ...] of length 1 or 0 per image; apart from the pixels, so that no graph refers to itself."""

    direction: Tensor | None = None

    def joined(self, grad: Tensor) -> Tensor:
        """Return a gradient less the direction at the gradient's own length."""
        if self.direction is None:
            return grad
        return grad - per_image(grad.flatten(1).norm(dim=1), grad) * self.direction


class _Steered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, pull: _Pull) -> Tensor:
        ctx.pull = pull
        return pixels.view_as(pixels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found: Tensor = ctx.pull.joined(grads[0])
        return found, None


_WITHIN: ContextVar[bool] = ContextVar("within a defence's own steps", default=False)


@contextlib.contextmanager
def own_steps() -> Iterator[None]:
    """Let the models inside be in their first gradient mode, whichever an attack has put them in.

    A defence that takes gradients of a defended model beneath it takes those that this model has, and not what an
    attack takes them for: otherwise the mode would change the very function that is attacked.
    """
    token = _WITHIN.set(True)
    try:
        yield
    finally:
        _WITHIN.reset(token)


def within_own_steps() -> bool:
    """Whether this is asked from inside `own_steps`."""
    return _WITHIN.get()


def as_now(work: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs inside or outside of `own_steps` as it is now: what a checkpoint makes again later.

    Example:
        >>> with own_steps():
        ...     ask = as_now(within_own_steps)
        >>> ask(), within_own_steps()
        (True, False)
    """
    within = _WITHIN.get()

    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _WITHIN.set(within)
        try:
            return work(*args, **kwargs)
        finally:
            _WITHIN.reset(token)

    return asked


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

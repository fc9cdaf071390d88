"""Gradients through parts that have none: the exact forward pass, and a stand-in for the backward one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError

Surrogate = Callable[..., Tensor]


class _ExactForward(torch.autograd.Function):
    """Has the value of one tensor, to the bit, and the gradient of another."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, value: Tensor) -> Tensor:
        del ctx, stand_in
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def straight_through(function: Callable[..., Tensor], x: Tensor, surrogate: Surrogate | None = None) -> Tensor:
    """Return `function(x)` exactly; its gradient is that of `surrogate(x)`, or the identity's without one.

    Source: backward pass differentiable approximation, Athalye et al. 2018 (arXiv 1802.00420, section 4.1).

    Raises:
        UserError: the stand-in has another shape than the value.

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> y = straight_through(torch.round, x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """
    with torch.no_grad():
        value = function(x)
    if not torch.is_grad_enabled() or not x.requires_grad:
        return value
    stand_in = x if surrogate is None else surrogate(x)
    if stand_in.shape != value.shape:
        what = "its input" if surrogate is None else "what its surrogate returns"
        raise UserError(
            f"a part without gradient returns {list(value.shape)}, but {what} is {list(stand_in.shape)}: "
            "give it a function `surrogate` that returns the shape of its output"
        )
    return _ExactForward.apply(stand_in.to(value.dtype), value)


def open_gradients(model: nn.Module) -> list[str]:
    """Give every part of `model` that has an attribute `differentiable = False` a backward pass; return sentences.

    The gradient is that of the part's attribute `surrogate`, a differentiable function of the same input, or the
    identity where it has none. Values stay as they are. The parts are changed in place; a second call finds nothing
    more to change but says the same.

    Example:
        >>> class Quantise(nn.Module):
        ...     differentiable = False
        ...     def forward(self, x): return (x * 7).round() / 7
        >>> open_gradients(nn.Sequential(Quantise(), nn.Flatten()))
        ["part '0' (Quantise) has no gradient: attacks go straight through it, as if it were the identity"]
    """
    said = []
    for name, part in model.named_modules():
        if getattr(part, "differentiable", True):
            continue
        surrogate: Surrogate | None = getattr(part, "surrogate", None)
        if surrogate is not None and not callable(surrogate):
            raise UserError(f"the surrogate of part '{name or 'model'}' must be a function, got {surrogate!r}")
        if not isinstance(part.forward, _Opened):
            part.forward = _Opened(part.forward, surrogate)
        how = (
            "attacks go straight through it, as if it were the identity"
            if surrogate is None
            else "attacks use the gradient of the surrogate that it gives"
        )
        said.append(f"part '{name or 'model'}' ({type(part).__name__}) has no gradient: {how}")
    return said


@contextlib.contextmanager
def opened_gradients(model: nn.Module) -> Iterator[list[str]]:
    """Open the gradients of a caller's module as `open_gradients` does, and leave all of its parts as they were.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> model[0].differentiable = False
        >>> with opened_gradients(model) as said:
        ...     len(said), "forward" in vars(model[0])
        (1, True)
        >>> "forward" in vars(model[0])
        False
    """
    before = [(part, vars(part).get("forward")) for part in model.modules()]
    try:
        yield open_gradients(model)
    finally:
        for part, forward in before:
            if forward is None:
                vars(part).pop("forward", None)
            else:
                part.forward = forward


class _Opened:
    """A part's forward pass with a backward pass of another function."""

    def __init__(self, function: Callable[..., Tensor], surrogate: Surrogate | None) -> None:
        self.function, self.surrogate = function, surrogate

    def __call__(self, x: Tensor, *others: object) -> Tensor:
        """Call the part with an input and perhaps more, such as a noise level, which its surrogate is given too."""
        surrogate = self.surrogate
        stand_in = None if surrogate is None else lambda y: surrogate(y, *others)
        return straight_through(lambda y: self.function(y, *others), x, stand_in)

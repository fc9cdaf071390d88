"""Steps that a defence takes on an image to answer it, and how an attack looks through them.

A defence that optimises its input moves an image x along gradients of a score of its own before it answers. What such
a step returns is computed here without a graph, whatever mode an attack is in, so that every mode attacks the very
same function; a mode only says what the step's derivative is taken to be:

* `exactly` (of `attacks.honesty`): that of the identity (BPDA, Athalye et al. 2018, arXiv 1802.00420);
* `recomputed`: that of the step itself, or of a smooth stand-in for it, which is computed again on the way back, one
  step at a time: memory does not grow with the number of steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from robustvlm.attacks.threat import per_image
from robustvlm.core.boundary import unscaled_gradients
from robustvlm.core.seeds import row_sums
from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.gradients import as_now, own_steps, plain_attention

_TINY = 1e-12
"""Below this length a gradient has no direction, and a step along it goes nowhere."""

SHARPNESS = 0.5
"""Width of the smooth sign, as a share of the root mean square of what it is taken of."""

MARGIN = 0.02
"""How far beyond a gate's threshold an attack is led that is to hold it on one side."""


Rest = ParamSpec("Rest")
Found = TypeVar("Found")
Asked = Callable[[Tensor], Tensor]


def in_full(
    work: Callable[Concatenate[Asked, Tensor, Rest], Found],
) -> Callable[Concatenate[Asked, Tensor, Rest], Found]:
    """Return a function of a model and images that leaves autocast.

    The sign of a gradient in half precision is noise, and so is a small distance of two features; an attack whose
    gradients are in half precision has to look through the very steps that the defence takes.

    Example:
        >>> @in_full
        ... def product(ask, x):
        ...     return x @ x
        >>> with torch.autocast("cpu"):
        ...     product(abs, torch.eye(2)).dtype
        torch.float32
    """

    @functools.wraps(work)
    def full(ask: Asked, x: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Found:
        with torch.autocast(x.device.type, enabled=False):
            return work(ask, x, *args, **kwargs)

    return full


@in_full
def score_gradient(score: Callable[[Tensor], Tensor], at: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
    """Return scores [B] at images [B, 3, H, W], and each one's gradient with regard to its image.

    It works for callers under `no_grad`, and leaves no gradient on weights.

    Args:
        score: images to one number each, rows by themselves.
        graph: keep both differentiable, with an attention kernel that has a second derivative.

    Example:
        >>> value, grad = score_gradient(lambda x: x.square().sum((1, 2, 3)), torch.full((1, 1, 1, 2), 3.0))
        >>> value.tolist(), grad.flatten().tolist()
        ([18.0], [6.0, 6.0])
    """
    with torch.enable_grad(), own_steps(), twice_differentiable() if graph else contextlib.nullcontext():
        point = at if graph and at.requires_grad else at.detach().requires_grad_()
        value = score(point)
        (grad,) = torch.autograd.grad(value.sum(), point, create_graph=graph)
    return (value, grad) if graph else (value.detach(), grad)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention on the plain kernel, and user's code with gradients as they are: both have second derivatives.

    The fused kernels of torch have none, and factors that a user's encoder has its gradients scaled by are constants
    for the first derivative only.
    """
    with plain_attention(), unscaled_gradients():
        yield


def recomputed(exact: Callable[..., Tensor], smooth: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `exact(*inputs)` with the gradient of `smooth(*inputs)`, which is computed when it is asked for.

    Args:
        exact: what the value is; run without a graph, so it has to enable gradients itself where it needs them.
        smooth: what takes its place in the backward pass; the same function where that has a derivative. It finds the
            random state that `exact` found.
        inputs: tensors, of which those that require a gradient get one; whatever else the functions use is a constant.

    Example:
        >>> v = torch.tensor([-2.0, 0.0, 1.0], requires_grad=True)
        >>> recomputed(torch.sign, torch.tanh, v).sum().backward()
        >>> v.grad
        tensor([0.0707, 1.0000, 0.4200])
    """
    found: Tensor = _Recomputed.apply(exact, as_now(smooth), *inputs)  # in whichever thread the way back is made
    return found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Callable[..., Tensor], smooth: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.smooth, ctx.states = smooth, _random_states(inputs[0].device)
        ctx.save_for_backward(*inputs)
        return exact(*inputs).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted, saved = ctx.needs_input_grad[2:], ctx.saved_tensors  # which a checkpoint lets be read once
        with torch.enable_grad(), _redrawing(saved[0].device, ctx.states):
            inputs = [t.detach().requires_grad_(need) for t, need in zip(saved, wanted, strict=True)]
            value = ctx.smooth(*inputs)
            at = [given for given, need in zip(inputs, wanted, strict=True) if need]
            found = iter(torch.autograd.grad(value, at, grads[0], allow_unused=True))
        return (None, None, *(next(found) if need else None for need in wanted))


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _redrawing(device: torch.device, states: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Let an encoder that draws (a smoothed one) draw what it drew at `states`."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        yield


# Gates: which side an attack's mode wants, and how far it is from there


def gate_hinge(score: Tensor, threshold: float, mode: str) -> Tensor:
    """Return how far scores [B] are from the side that `mode`, one of the gate's, wants; positive until they are there.

    The gate is open, and the defence acts, where a score is below the threshold.

    Example:
        >>> gate_hinge(torch.tensor([0.3, 0.9]), 0.5, "gate:off")
        tensor([ 0.2200, -0.3800])
    """
    return (threshold - score if mode == zoo.GATE_OFF else score - threshold) + MARGIN


# Steps along a gradient


def lengths(values: Tensor) -> Tensor:
    """Return the Euclidean length of rows, [B, ...] -> [B], and the least that has a direction for shorter ones."""
    return length_of(row_sums(values * values))


def length_of(squares: Tensor) -> Tensor:
    """Return the length [B] of rows whose squares sum to these."""
    return squares.clamp_min(_TINY**2).sqrt()


def smooth_sign(values: Tensor) -> Tensor:
    """Return tanh(v / (.5 rms v)) of rows [B, ...]: a sign with a derivative, for the backward pass alone.

    Example:
        >>> smooth_sign(torch.tensor([[4.0, -4.0, 0.0, 4.0]])).round(decimals=2)
        tensor([[ 0.9800, -0.9800,  0.0000,  0.9800]])
    """
    rms = lengths(values) / values[0].numel() ** 0.5
    return torch.tanh(values / per_image(SHARPNESS * rms, values))


def sign_step(
    score: Callable[[Tensor], Tensor], y: Tensor, x: Tensor, *, size: float, reach: float, smooth: bool
) -> tuple[Tensor, Tensor]:
    """Return the scores [B] at `y`, and `y` a sign step up its score, within x +- `reach` and [0, 1].

    Args:
        smooth: leave the step differentiable, with a smooth sign in place of the sign.

    Example:
        >>> x = torch.full((1, 1, 1, 2), 0.5)
        >>> sign_step(lambda v: v.sum((1, 2, 3)), x, x, size=0.25, reach=1.0, smooth=False)[1].flatten()
        tensor([0.7500, 0.7500])
    """
    value, grad = score_gradient(score, y, graph=smooth)
    return value.detach(), within(y + size * (smooth_sign(grad) if smooth else grad.sign()), x, reach)


def unit_rows(values: Tensor) -> Tensor:
    """Return rows [B, ...] at Euclidean length 1; a row of zeros stays one.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return values / per_image(lengths(values), values)


def within(y: Tensor, x: Tensor, reach: float) -> Tensor:
    """Return `y` clipped to x +- reach and to [0, 1]; on a bound the gradient passes.

    Example:
        >>> within(torch.tensor([0.9, -0.4]), torch.tensor([0.5, 0.1]), 0.2)
        tensor([0.7000, 0.0000])
    """
    return torch.clamp(y, x - reach, x + reach).clamp(0.0, 1.0)

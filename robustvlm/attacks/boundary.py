"""One step along a linearised decision boundary, and what it tells of the boundary's distance from the image."""

from __future__ import annotations

import torch
from torch import Tensor

from robustvlm.attacks.hyperplane import step_to_plane
from robustvlm.attacks.threat import l2_norms, per_image
from robustvlm.core.sums import row_sums

_TINY = 1e-12  # makes the bias 0 where neither step moves anything


def boundary_step(
    x0: Tensor,
    x: Tensor,
    loss: Tensor,
    grad: Tensor,
    norm: str,
    *,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Return the next point of FAB's walk, and the distance of the image from the linearised boundary.

    The boundary is where the objective is zero, linearised at `x`: the hyperplane of all z with
    loss + <grad, z - x> = 0. From `x`, or where the loss is positive from a point pulled back towards the image, the
    walk goes `eta` times the way to the hyperplane's nearest point in the pixel box, mixed with the same step from
    the image (arXiv 1907.02044, equations 8 and 9).

    Args:
        x0: images [B, ...].
        x: points [B, ...], evaluated to `loss` [B] with gradients `grad` [B, ...].
        norm: "Linf" or "L2".
        alpha_max: largest share of the step from the image.
        eta: overshoot.
        beta: share of the distance to the image that is left after a success.

    Example:
        >>> x0, w = torch.full((1, 2), 0.5), torch.tensor([[1.0, 1.0]])
        >>> x, distance = boundary_step(x0, x0, torch.tensor([-0.2]), w, "Linf", eta=1.0)
        >>> x, distance
        (tensor([[0.6000, 0.6000]]), tensor([0.1000]))
    """
    loss = loss.to(x.dtype)
    start = torch.where(per_image(loss > 0, x), x0 + beta * (x - x0), x)
    ahead, home = (step_to_plane(z, grad, -loss - _dot(grad, z - x), norm) for z in (start, x0))
    far, near = lengths(ahead, norm), lengths(home, norm)
    bias = per_image((far / (far + near).clamp_min(_TINY)).clamp_max(alpha_max), x)
    return ((1 - bias) * (start + eta * ahead) + bias * (x0 + eta * home)).clamp(0, 1), near


def lengths(delta: Tensor, norm: str) -> Tensor:
    """Return the Linf or L2 norm of every image's perturbation, [B, ...] -> [B].

    Example:
        >>> lengths(torch.tensor([[3.0, -4.0]]), "L2"), lengths(torch.tensor([[3.0, -4.0]]), "Linf")
        (tensor([5.]), tensor([4.]))
    """
    return delta.flatten(1).abs().amax(1) if norm == "Linf" else l2_norms(delta)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return row_sums(a * b)

"""Random views of an image by sampling on a grid: crops, mirrors and perspectives, differentiable in the pixels.

What is random comes in as numbers in [0, 1), so that the views themselves are functions. Sampling is at the side of the
image given: bilinear for crops, as torchvision's random resized crop is where nothing else is said, and the releases
say nothing; bicubic for perspectives (Keys' kernel with a = -.75, where Pillow has -.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustvlm.defenses.zoo.gradients import as_now

CROP_DRAWS = 5
"""Numbers that a crop takes: area, shape, mirror, place across, place down."""

CORNER_DRAWS = 8
"""Numbers that a perspective takes: how far each of four corners moves in, across and down."""

ROWS_PER_PASS = 256
"""Most views that are encoded at a time."""

View = Callable[[Tensor], Tensor]
"""A view of images [B, 3, H, W], each row by itself."""


def crops(pixels: Tensor, draws: Tensor, *, least: float = 0.08, ratio: float = 4 / 3, flip: float = 0.5) -> Tensor:
    """Return a random resized crop of every image at its own size, mirrored or not.

    The area is uniform between `least` and 1 of the image's, the logarithm of width to height, both as shares of the
    image's own, between those of 1/ratio and ratio; a side that would exceed the image is cut down to it. Where the
    crop lies is uniform.

    Args:
        pixels: [B, 3, H, W] in [0, 1]; draws: uniform in [0, 1), [B, 5], see `CROP_DRAWS`.
        flip: probability of a mirror image.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(crops(x, torch.full((2, 5), 0.9), least=1.0, ratio=1.0), x, atol=1e-5)
        True
    """
    area, shape, mirror, across, down = draws.to(pixels).unbind(1)
    area, skew = least + (1 - least) * area, torch.exp((2 * shape - 1) * (0.5 * math.log(ratio)))
    width, height = (area.sqrt() * skew).clamp_max(1.0), (area.sqrt() / skew).clamp_max(1.0)
    theta = pixels.new_zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = torch.where(mirror < flip, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2 * across - 1) * (1 - width)
    theta[:, 1, 2] = (2 * down - 1) * (1 - height)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def perspectives(pixels: Tensor, draws: Tensor, *, distortion: float = 0.5) -> Tensor:
    """Return a random perspective of every image: its corners move inwards, what is left empty is black.

    Args:
        pixels: [B, 3, H, W] in [0, 1]; draws: uniform in [0, 1), [B, 8], see `CORNER_DRAWS`.
        distortion: most that a corner moves in each direction, as a share of half the side.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.allclose(perspectives(x, torch.rand(2, 8), distortion=0.0), x, atol=1e-5)
        True
    """
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    moved = corners * (1 - distortion * draws.double().cpu().view(-1, 4, 2))
    back = homography(moved, corners.expand_as(moved)).to(pixels)
    down, across = (_centres(side, pixels) for side in pixels.shape[-2:])
    places = torch.stack([*torch.meshgrid(across, down, indexing="xy"), pixels.new_ones(len(down), len(across))], -1)
    found = torch.einsum("bij,hwj->bhwi", back, places)
    grid = found[..., :2] / found[..., 2:]
    seen = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return seen.clamp(0.0, 1.0)  # bicubic overshoots


def _centres(side: int, pixels: Tensor) -> Tensor:
    """Return the places of the pixels of a line, from -1 to 1 between its ends."""
    return (2 * torch.arange(side, device=pixels.device, dtype=pixels.dtype) + 1) / side - 1


def homography(source: Tensor, target: Tensor) -> Tensor:
    """Return the projective maps [B, 3, 3] that bring four points [B, 4, 2] to four others; the last entry is 1.

    Example:
        >>> square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]).double()
        >>> homography(square, 2 * square)[0].diagonal()
        tensor([2., 2., 1.], dtype=torch.float64)
    """
    x, y = source.unbind(-1)
    one, nil = torch.ones_like(x), torch.zeros_like(x)
    rows = []
    for place in (0, 1):
        u = target[..., place]
        point, none = [x, y, one], [nil, nil, nil]
        rows.append(torch.stack([*(point + none if place == 0 else none + point), -u * x, -u * y], dim=-1))
    values = torch.linalg.solve(torch.cat(rows, 1), torch.cat([target[..., 0], target[..., 1]], 1))
    return torch.cat([values, torch.ones_like(values[:, :1])], 1).view(-1, 3, 3)


def features_of(encode: View, views: Sequence[View], pixels: Tensor, *, rows_per_pass: int = ROWS_PER_PASS) -> Tensor:
    """Return what `encode` says of every view of every image, [B, V, D], a bounded number of rows at a time.

    With a gradient, each pass is made again on the way back, so that memory is that of one pass.

    Args:
        encode: images [R, 3, H, W] to features (or logits) [R, D]; views: images [B, 3, H, W] to one view of each.

    Example:
        >>> features_of(lambda v: v.mean((2, 3)), [torch.clone, torch.neg], torch.ones(1, 3, 8, 8)).tolist()
        [[[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]]
    """

    def passed(images: Tensor, part: Sequence[View]) -> Tensor:
        rows = torch.stack([view(images) for view in part], dim=1)
        return encode(rows.flatten(0, 1)).view(len(images), len(part), -1)

    size = max(1, rows_per_pass // max(1, len(pixels)))
    parts = [views[start : start + size] for start in range(0, len(views), size)]
    if len(parts) > 1 and torch.is_grad_enabled() and pixels.requires_grad:
        return torch.cat([checkpoint(as_now(passed), pixels, part, use_reentrant=False) for part in parts], dim=1)
    return torch.cat([passed(pixels, part) for part in parts], dim=1)


def drawn(view: Callable[[Tensor, Tensor], Tensor], draws: Tensor) -> list[View]:
    """Return the views `view(pixels, draws[:, i])`, i < V, of random numbers [B, V, k].

    Example:
        >>> [one] = drawn(torch.mul, torch.full((2, 1, 1), 3.0))
        >>> one(torch.ones(2, 1)).tolist()
        [[3.0], [3.0]]
    """
    return [partial(_at, view, numbers) for numbers in draws.unbind(1)]


def _at(view: Callable[[Tensor, Tensor], Tensor], numbers: Tensor, pixels: Tensor) -> Tensor:
    return view(pixels, numbers)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of logits [..., K] -> [...].

    Example:
        >>> entropies(torch.zeros(2)).item()
        0.6931471824645996
    """
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)

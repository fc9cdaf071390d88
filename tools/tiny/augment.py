"""Strong augmentation: what makes a model trained on six styles recognise a seventh."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.data.emoji import background, chance, draw, placement_grid, uniform

# RGB -> YIQ: hue is an angle in the I-Q plane, saturation its radius.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = torch.linalg.inv(_YIQ)


def augment(sprites: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return strongly changed pictures [N, 3, S, S] of sprites [N, 4, S, S] and the background colour of each."""
    n, _, _, size = sprites.shape
    premultiplied, alpha = draw(sprites, _strong_grid(n, size, generator))
    colour = recolour(premultiplied / alpha.clamp(min=1e-3), generator)
    colour, alpha = outline(colour, alpha, generator)
    alpha = erase(alpha, generator)
    backdrop, index = background(n, size, generator)
    pixels = colour * alpha + backdrop * (1 - alpha)
    return degrade(pixels, generator), index


def _strong_grid(n: int, size: int, generator: torch.Generator) -> Tensor:
    scale = uniform(n, 0.6, 1.02, generator)
    room = (1 - scale).clamp(min=0)[:, None]
    jitter = (torch.rand(n, 2, generator=generator) * 2 - 1) * 0.08
    grid = placement_grid(
        n,
        size,
        scale=scale,
        angle=uniform(n, -25, 25, generator) * (math.pi / 180),
        shift=(torch.rand(n, 2, generator=generator) * 2 - 1) * room + jitter,
        shear=uniform(n, -0.15, 0.15, generator),
        aspect=uniform(n, -0.12, 0.12, generator).exp(),
        flip=1 - 2 * chance(n, 0.5, generator).flatten(),
    )
    waves = torch.randn(n, 2, 4, 4, generator=generator) * 0.06 * chance(n, 0.7, generator)
    elastic = F.interpolate(waves, size=(size, size), mode="bicubic", align_corners=False)
    return grid + elastic.permute(0, 2, 3, 1)


def recolour(colour: Tensor, generator: torch.Generator) -> Tensor:
    """Turn the hue, scale saturation (sometimes to grey), contrast and brightness of each picture."""
    n = len(colour)
    hue = uniform(n, -0.35, 0.35, generator) * chance(n, 0.6, generator).flatten()
    saturation = uniform(n, 0.4, 1.5, generator) * (1 - chance(n, 0.12, generator).flatten())
    turn = torch.zeros(n, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    turned = (_RGB @ turn @ _YIQ @ colour.flatten(2)).view_as(colour)
    contrast = uniform(n, 0.6, 1.5, generator)[:, None, None, None]
    brightness = uniform(n, -0.15, 0.15, generator)[:, None, None, None]
    return ((turned - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def outline(colour: Tensor, alpha: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw dark contours on some pictures, a third of those as line art on a pale fill."""
    n = len(colour)
    lined = chance(n, 0.18, generator)
    pale = chance(n, 0.3, generator) * lined
    inner = (_range3(colour.mean(1, keepdim=True)) * 2.5).clamp(0, 1) * alpha
    border = _range3(alpha).clamp(0, 1)
    ink = inner.maximum(border) * lined
    filled = colour * (1 - pale) + 0.95 * pale
    return filled * (1 - ink), alpha.maximum(border * lined)


def _range3(values: Tensor) -> Tensor:
    """Maximum minus minimum over 3x3 neighbourhoods: an edge detector."""
    return F.max_pool2d(values, 3, 1, 1) + F.max_pool2d(-values, 3, 1, 1)


def erase(alpha: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a square out of a third of the sprites, so that no single detail decides."""
    n, _, size, _ = alpha.shape
    centre = torch.rand(n, 2, generator=generator) * size
    half = uniform(n, 6, 14, generator)[:, None]
    axis = torch.arange(size).float()[None]
    across = ((axis - centre[:, :1]).abs() < half).float()
    down = ((axis - centre[:, 1:]).abs() < half).float()
    hole = down[:, None, :, None] * across[:, None, None, :] * chance(n, 0.3, generator)
    return alpha * (1 - hole)


def degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise to some pictures and blur some."""
    n = len(pixels)
    strength = 0.04 * torch.rand(n, 1, 1, 1, generator=generator) * chance(n, 0.4, generator)
    noisy = pixels + torch.randn(pixels.shape, generator=generator) * strength
    blurred = F.avg_pool2d(F.pad(noisy, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(noisy, blurred, chance(n, 0.15, generator)).clamp(0, 1)

"""Put sprites on seeded backgrounds: pure tensor functions shared by the bundled data set and its training."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.05, 0.05, 0.05),
    "gray": (0.55, 0.55, 0.55),
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.60, 0.15),
    "yellow": (0.97, 0.90, 0.30),
    "green": (0.25, 0.70, 0.30),
    "blue": (0.20, 0.40, 0.90),
    "light blue": (0.60, 0.80, 1.00),
    "purple": (0.55, 0.25, 0.75),
    "pink": (1.00, 0.65, 0.80),
    "brown": (0.50, 0.32, 0.18),
}
_PLAIN = 0.3  # share of backgrounds of one colour; the others are gradients
_TEXTURED = 0.35  # share with a low-frequency texture on top


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return [n] draws from the uniform distribution on [low, high)."""
    return torch.rand(n, generator=generator) * (high - low) + low


def chance(n: int, probability: float, generator: torch.Generator) -> Tensor:
    """Return [n, 1, 1, 1] zeros and ones, one with the given probability."""
    return (torch.rand(n, 1, 1, 1, generator=generator) < probability).float()


def background(n: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return plain, gradient or textured backgrounds [n, 3, size, size] in [0, 1] and the index of each main colour.

    Example:
        >>> pixels, colour = background(2, 8, torch.Generator().manual_seed(0))
        >>> tuple(pixels.shape), tuple(colour.shape)
        ((2, 3, 8, 8), (2,))
    """
    palette = torch.tensor(list(BACKGROUNDS.values()))
    colour = torch.randint(len(palette), (n,), generator=generator)
    first = (palette[colour] + 0.08 * torch.randn(n, 3, generator=generator)).clamp(0, 1)
    plain = torch.rand(n, 1, generator=generator) < _PLAIN
    second = torch.where(plain, first, (first + 0.22 * torch.randn(n, 3, generator=generator)).clamp(0, 1))
    weight = _ramp(uniform(n, 0, 2 * math.pi, generator), size)
    pixels = torch.lerp(first[:, :, None, None], second[:, :, None, None], weight)
    noise = torch.randn(n, 3, 8, 8, generator=generator) * 0.06 * chance(n, _TEXTURED, generator)
    texture = F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False)
    return (pixels + texture).clamp(0, 1), colour


def _ramp(angle: Tensor, size: int) -> Tensor:
    """Return [N, 1, size, size] weights that rise from 0 to 1 along each angle (radians)."""
    axis = torch.linspace(-1, 1, size)
    along = axis[None, None, :] * angle.cos()[:, None, None] + axis[None, :, None] * angle.sin()[:, None, None]
    return (along * 0.5 + 0.5).clamp(0, 1)[:, None]


def placement_grid(
    n: int, size: int, *, scale: Tensor, angle: Tensor, shift: Tensor, shear: Tensor, aspect: Tensor, flip: Tensor
) -> Tensor:
    """Return the sampling grid [n, size, size, 2] that draws each sprite scaled, turned (radians), sheared and moved.

    `scale`, `angle`, `shear`, `aspect` and `flip` (1, or -1 to mirror) have shape [n], `shift` [n, 2] is in units of
    half the image.
    """
    cosine, sine = angle.cos(), angle.sin()
    across = torch.stack([cosine, sine + shear], -1) * (flip / (scale * aspect))[:, None]
    down = torch.stack([-sine, cosine], -1) * (aspect / scale)[:, None]
    inverse = torch.stack([across, down], 1)
    offset = -(inverse @ shift[:, :, None])
    return F.affine_grid(torch.cat([inverse, offset], 2), [n, 4, size, size], align_corners=False)


def draw(sprites: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Sample sprites [N, 4, H, W] (straight alpha, [0, 1]); return premultiplied colour and alpha [N, 3|1, S, S]."""
    colour, alpha = sprites[:, :3], sprites[:, 3:]
    drawn = F.grid_sample(torch.cat([colour * alpha, alpha], 1), grid, align_corners=False)
    return drawn[:, :3], drawn[:, 3:].clamp(0, 1)


def compose(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Return sprites [N, 4, S, S] on backgrounds with a mild change of size, angle and place: [N, 3, S, S] in [0, 1].

    Example:
        >>> sprite = torch.ones(1, 4, 16, 16)
        >>> tuple(compose(sprite, torch.Generator().manual_seed(0)).shape)
        (1, 3, 16, 16)
    """
    n, _, _, size = sprites.shape
    scale = uniform(n, 0.75, 1.0, generator)
    angle = uniform(n, -10, 10, generator) * (math.pi / 180)
    shift = (torch.rand(n, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    one = torch.ones(n)
    grid = placement_grid(n, size, scale=scale, angle=angle, shift=shift, shear=torch.zeros(n), aspect=one, flip=one)
    colour, alpha = draw(sprites, grid)
    backdrop, _ = background(n, size, generator)
    return (colour + backdrop * (1 - alpha)).clamp(0, 1)

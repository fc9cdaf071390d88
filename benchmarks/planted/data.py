"""A small made-up task: coarse coloured patterns, one per class, at varying contrast under noise."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 16
ATTACKED = 48
CLASSES = ("ash", "birch", "cedar", "elm")


def patterns() -> Tensor:
    """Return the patterns of the classes [K, 3, SIDE, SIDE], values -1 and 1 on a 4 x 4 grid."""
    draws = torch.Generator().manual_seed(11)
    coarse = torch.randint(0, 2, (len(CLASSES), 3, 4, 4), generator=draws).float() * 2 - 1
    return F.interpolate(coarse, SIDE, mode="nearest")


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, SIDE, SIDE] on the 8-bit grid and their labels [N]; contrast varies, and so do margins."""
    draws = torch.Generator().manual_seed(seed)
    label = torch.randint(0, len(CLASSES), (count,), generator=draws)
    contrast = 0.005 + 0.03 * torch.rand(count, 1, 1, 1, generator=draws)
    noise = 0.04 * torch.randn(count, 3, SIDE, SIDE, generator=draws)
    x = (0.5 + contrast * patterns()[label] + noise).clamp(0, 1)
    return (x * 255).round() / 255, label


def write_folder(root: Path, count: int = ATTACKED, seed: int = 1) -> Path:
    """Write images as an image folder, one subfolder per class, and return it."""
    pixels, label = images(count, seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, (x, y) in enumerate(zip(pixels, label.tolist(), strict=True)):
        array = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(root / CLASSES[y] / f"{number:03d}.png")
    return root

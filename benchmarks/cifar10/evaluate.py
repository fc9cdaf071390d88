"""Clean and PGD-20 accuracy of a trained model."""

from __future__ import annotations

import torch

from .attack import pgd
from .data import Images, to_unit
from .model import CifarCLIP
from .prompts import class_embeddings


def accuracy(model: CifarCLIP, images: Images, *, eps: float = 0.0, steps: int = 20, batch: int = 250) -> float:
    """Zero-shot accuracy on `images`, on PGD examples of radius `eps` when it is above 0."""
    targets, right = class_embeddings(model, images.class_names), 0
    for rows in torch.arange(len(images.labels)).split(batch):
        pixels, labels = to_unit(images.pixels[rows]), images.labels[rows]
        if eps:
            pixels = pgd(model, pixels, labels, targets, eps=eps, alpha=eps / 4, steps=steps)
        with torch.no_grad():
            right += int((model.logits(pixels, targets).argmax(dim=1) == labels).sum())
    return right / len(images.labels)


def measure(model: CifarCLIP, test: Images, *, attacked: int = 1000) -> dict[str, float]:
    """Clean accuracy on all of `test`; PGD-20 (alpha eps/4, one random start) on its first `attacked` images."""
    torch.manual_seed(0)
    some = Images(test.pixels[:attacked], test.labels[:attacked], test.class_names)
    robust = {f"pgd20_{k}/255": accuracy(model, some, eps=k / 255) for k in (1, 2, 4, 8)}
    return {"clean": accuracy(model, test), "clean_attacked_images": accuracy(model, some), **robust}

"""Which parameters of any model an image passes through, found by differentiation rather than by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError
from robustvlm.models import VLM


def vision_parameters(vlm: VLM) -> list[str]:
    """Return the names of the parameters that image features depend on: the vision tower with its projection.

    Raises UserError when there are none, as in a model that is no module or computes without gradients.

    Example:
        >>> from robustvlm.models import load_model
        >>> vision_parameters(load_model("tiny"))[0]
        'model.visual.conv1.weight'
    """
    names = _reached(vlm)
    if not names:
        raise UserError(
            f"'{vlm.spec}' has no parameters that its image features depend on: a model to be fine-tuned has to be a "
            "torch.nn.Module that computes them with gradients"
        )
    return names


def last_blocks(vlm: VLM, count: int) -> list[str]:
    """Return the names of the parameters of the last `count` blocks and of all that comes after them.

    A block is a module in a Sequential or ModuleList of nothing but composed modules, such as a transformer's layer or
    a ResNet's bottleneck. What comes after is what still has a gradient once the first of these blocks has its input
    cut off from the rest.

    Raises UserError when the vision tower has no such blocks, or fewer.
    """
    blocks = vision_blocks(vlm)
    if not blocks:
        raise UserError(f"the vision tower of '{vlm.spec}' has no blocks to count: train all of it (--trainable all)")
    if count > len(blocks):
        raise UserError(f"the vision tower of '{vlm.spec}' has {len(blocks)} blocks, got last:{count}")
    handle = blocks[-count].register_forward_pre_hook(_cut, with_kwargs=True)
    try:
        return _reached(vlm)
    finally:
        handle.remove()


def vision_blocks(vlm: VLM) -> list[nn.Module]:
    """Return the blocks of the vision tower, the first one first; a block within a block does not count."""
    vision = set(vision_parameters(vlm))
    found: dict[str, nn.Module] = {}
    for path, module in vlm.named_modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList)) or any(path.startswith(f"{b}.") for b in found):
            continue
        children = {
            name: child for name, child in module.named_children() if next(child.parameters(), None) is not None
        }
        if any(type(child).__module__.startswith("torch.nn") for child in children.values()):
            continue
        prefix = f"{path}." if path else ""
        found |= {
            prefix + name: child
            for name, child in children.items()
            if any(f"{prefix}{name}.{inner}" in vision for inner, _ in child.named_parameters())
        }
    return list(found.values())


def vision_module(vlm: VLM) -> nn.Module:
    """Return the smallest module that holds all parameters of the vision tower."""
    paths = [name.split(".")[:-1] for name in vision_parameters(vlm)]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return vlm.get_submodule(".".join(parts[0] for parts in shared))


def _cut(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    del module
    cut = [a.detach() if isinstance(a, Tensor) else a for a in args]
    return tuple(cut), {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}


def _reached(vlm: VLM) -> list[str]:
    """Return the names of the parameters that have a gradient in the features of one image."""
    parameters = {name: p for name, p in vlm.named_parameters() if p.is_floating_point()}
    pixels = torch.linspace(0, 1, 3 * vlm.image_size**2, device=vlm.device).view(1, 3, vlm.image_size, -1)
    with _differentiable(list(parameters.values())), torch.enable_grad():
        features = vlm.embed_image(pixels)
        if not parameters or not features.requires_grad:
            return []
        grads = torch.autograd.grad(features.float().sum(), list(parameters.values()), allow_unused=True)
    return [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]


@contextmanager
def _differentiable(parameters: list[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)

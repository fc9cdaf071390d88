"""Counting encoder passes where they happen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Passes:
    """How many images went through a module, forward and backward."""

    forward = 0
    backward = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward


@contextmanager
def counted(module: nn.Module) -> Iterator[Passes]:
    """Count the rows that pass through `module` inside the block; a backward pass counts when its output gets there.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1)
        >>> with counted(layer) as passes:
        ...     layer(torch.ones(3, 2)).sum().backward()
        >>> passes.forward, passes.backward
        (3, 3)
    """
    passes = Passes()

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        if not isinstance(output, Tensor):
            return
        passes.forward += len(output)
        if output.requires_grad:
            output.register_hook(came_back)

    def came_back(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    handle = module.register_forward_hook(seen)
    try:
        yield passes
    finally:
        handle.remove()

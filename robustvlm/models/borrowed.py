"""A caller's module, used as it must be for an evaluation and given back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

Thing = TypeVar("Thing")
Module = TypeVar("Module", bound=nn.Module)


@contextlib.contextmanager
def borrowed(module: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Put a module into evaluation mode with frozen weights, and every part and weight back as it was, error or not.

    Gradients with regard to inputs pass frozen weights; none is left in their `.grad`. Without `frozen` only modes are
    switched, so that what was made inside can be trained on.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
        >>> with borrowed(model):
        ...     print(model.training, model[0].weight.requires_grad)
        False False
        >>> model.training, model[1].training, model[0].weight.requires_grad
        (True, False, True)
    """
    # The flags themselves, not train() and eval(): these may do more, and know one mode for all parts.
    training = [part for part in module.modules() if part.training]
    trainable = [parameter for parameter in module.parameters() if frozen and parameter.requires_grad]
    try:
        for part in training:
            part.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def placed(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """Return a module itself if all of it is on `device` in `dtype` already, else a copy that is.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> placed(model, torch.device("cpu"), torch.float32) is model
        True
        >>> placed(model, torch.device("cpu"), torch.float64).weight.dtype, model.weight.dtype
        (torch.float64, torch.float32)
    """
    place = torch.empty(0, device=device).device
    tensors = (tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
    if all(t.device == place and (not t.is_floating_point() or t.dtype == dtype) for t in tensors):
        return module
    return copy.deepcopy(module).to(device=place, dtype=dtype)


def own_copy(thing: Thing) -> Thing:
    """Return a copy of a user's module to freeze and move at will, the module itself where it cannot be copied.

    Objects that are no modules are not switched or frozen, and stay what they are.
    """
    if not isinstance(thing, nn.Module):
        return thing
    try:
        return copy.deepcopy(thing)
    except Exception:  # locks, handles, tensors of a graph: anything may stand in a user's object
        return thing

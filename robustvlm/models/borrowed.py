"""A caller's module, used as it must be for an evaluation and given back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from robustvlm.models.reach import Reached

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

    A copy that still runs parts of the original (a patched `forward`, a function that holds on to them: Python copies
    no functions) is none: these parts would keep their training mode and their device. Objects that are no modules are
    not switched or frozen, and stay what they are.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> own_copy(net) is net
        False
        >>> net.forward = lambda x: nn.functional.linear(x, net.weight)
        >>> own_copy(net) is net
        True
    """
    if not isinstance(thing, nn.Module):
        return thing
    try:
        found = copy.deepcopy(thing)
        return thing if _leads_back(found, thing) else found
    except Exception:  # locks, handles, tensors of a graph: anything may stand in a user's object
        return thing


def _leads_back(found: nn.Module, original: nn.Module) -> bool:
    """Whether what the parts of a copy hold leads to a part of the original that was to be copied."""
    own, copied = (
        {id(part) for parts in (one.modules(), one.parameters(), one.buffers()) for part in parts}
        for one in (original, found)
    )
    names = vars(nn.Module()).keys()
    held = [value for part in found.modules() for name, value in vars(part).items() if name not in names]
    reached = Reached(held, private=True)
    modules = (part for module in reached.modules.values() for part in module.modules())
    return any(id(part) in own - copied for parts in (modules, reached.tensors.values()) for part in parts)

"""Plain weights of a model whose weights are given by LoRA or SSF."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `module` under the names it had before `make_trainable`, updates merged in.

    Example:
        >>> from robustvlm.models import load_model
        >>> from robustvlm.defenses.finetune.trainable import make_trainable
        >>> vlm = load_model("tiny")
        >>> before = vlm.state_dict()
        >>> make_trainable(vlm, "lora:2")
        >>> plain_state(vlm).keys() == before.keys()
        True
    """
    merged = {
        f"{path}.{name}" if path else name: getattr(part, name).detach()
        for path, part in module.named_modules()
        if parametrize.is_parametrized(part)
        for name in _parametrized(part)
    }
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        path, inside, rest = name.rpartition("parametrizations.")
        if not inside:
            state[name] = value
        elif rest.split(".")[1] == "original":
            plain = path + rest.split(".")[0]
            state[plain] = merged[plain]
    return state


def merge(module: nn.Module) -> None:
    """Replace LoRA and SSF by the weights that they amount to, in place; a module without them is left alone."""
    for part in list(module.modules()):
        if not parametrize.is_parametrized(part):
            continue
        merged = {name: getattr(part, name).detach().clone() for name in _parametrized(part)}
        # Not by remove_parametrizations, which takes the attributes from the class that copies of the module share.
        part.__class__ = parametrize.type_before_parametrizations(part)
        del part.parametrizations
        for name, value in merged.items():
            part.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _parametrized(part: nn.Module) -> list[str]:
    return [name for name, _ in part.get_submodule("parametrizations").named_children()]

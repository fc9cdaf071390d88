"""Which parameters of a vision tower are trained: `all`, `lora[:RANK]`, `ssf` or `last:N`."""

from __future__ import annotations

import re

from robustvlm.defenses.finetune.trainable.lora import add_lora
from robustvlm.defenses.finetune.trainable.merge import merge, plain_state
from robustvlm.defenses.finetune.trainable.ssf import add_ssf
from robustvlm.defenses.finetune.trainable.vision import last_blocks, vision_module, vision_parameters
from robustvlm.errors import UserError
from robustvlm.models import VLM

DEFAULT_RANK = 8
_FORM = re.compile(r"(all|ssf)|(lora)(?::(\d{1,4}))?|(last):(\d{1,4})")

__all__ = [
    "make_trainable",
    "merge",
    "parse_trainable",
    "plain_state",
    "require_trainable",
    "vision_module",
    "vision_parameters",
]


def parse_trainable(text: str) -> tuple[str, int]:
    """Return the kind of a subset and its number (LoRA's rank, how many blocks; 0 where there is none).

    Raises UserError for anything but `all`, `lora`, `lora:RANK`, `ssf` and `last:N`.

    Example:
        >>> parse_trainable("lora"), parse_trainable("last:2")
        (('lora', 8), ('last', 2))
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UserError(f"trainable must be all, lora, lora:RANK, ssf or last:N, got '{text}'")
    whole, lora, rank, last, blocks = found.groups()
    kind, number = whole or lora or last, int(rank or blocks or (DEFAULT_RANK if lora else 0))
    if kind in ("lora", "last") and number < 1:
        raise UserError(f"the number in '{text}' must be at least 1")
    return kind, number


def require_trainable(vlm: VLM, text: str) -> None:
    """Change nothing; raise UserError for an unknown subset of the vision tower, or one that this model lacks."""
    kind, number = parse_trainable(text)
    if kind == "last":
        last_blocks(vlm, number)
    else:
        vision_parameters(vlm)


def make_trainable(vlm: VLM, text: str, *, seed: int = 0) -> None:
    """Let the parameters of a subset of the vision tower require gradients, all others not; the function is unchanged.

    LoRA and SSF add parameters to the model (see `merge` and `plain_state` for the way back).

    Raises UserError for an unknown subset, or one that this model does not have.
    """
    kind, number = parse_trainable(text)
    names = last_blocks(vlm, number) if kind == "last" else vision_parameters(vlm)
    vlm.requires_grad_(False)
    if kind in ("all", "last"):
        parameters = dict(vlm.named_parameters())
        for name in names:
            parameters[name].requires_grad_(True)
        return
    changed = add_lora(vlm, set(names), number, seed=seed) if kind == "lora" else add_ssf(vlm, set(names))
    if not changed:
        raise UserError(f"the vision tower of '{vlm.spec}' has no linear or convolutional layers for {kind}: pass all")

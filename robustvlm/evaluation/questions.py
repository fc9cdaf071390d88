"""The first questions to a model, and the note that a run makes where memory did not suffice for all of its lanes."""

from __future__ import annotations

from torch import Tensor

from robustvlm.attacks import Oracle, Probe
from robustvlm.attacks.probe import ask_first
from robustvlm.runs.summary import Check


def ask(oracle: Oracle, images: Tensor, label: Tensor, *, model: str) -> tuple[Probe, list[Check]]:
    """Probe a model on images [L, 3, H, W] and labels [L]; the notes say if memory sufficed for fewer only.

    Raises:
        UserError: the model fails on such a batch, or gives no gradient.

    Example:
        >>> import torch
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> found, notes = ask(oracle, torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), model="linear")
        >>> found.finite, notes
        (True, [])
    """
    found = ask_first(oracle, images, label, model=f"model '{model}'")
    if found.rungs[0] == len(images):
        return found, []
    message = f"Memory did not suffice for more than {found.rungs[0]} lanes."
    return found, [Check(name="lanes", level="note", message=message)]

"""The first questions to a model, put with as many lanes as memory allows; a model that cannot answer is named."""

from __future__ import annotations

from torch import Tensor

from robustvlm.attacks import Oracle, Probe, probe
from robustvlm.core.foreign_text import one_line
from robustvlm.core.memory import is_out_of_memory
from robustvlm.errors import UserError
from robustvlm.runs.summary import Check

# What torch says when nothing leads from the output back to the pixels.
_NO_GRADIENT = ("does not require grad", "not have been used in the graph")


def ask(oracle: Oracle, images: Tensor, label: Tensor, *, model: str) -> tuple[Probe, list[Check]]:
    """Probe a model on images [L, 3, H, W] and labels [L], with half as many for as long as memory runs out.

    Raises:
        UserError: the model fails on such a batch, or gives no gradient.

    Example:
        >>> import torch
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> found, notes = ask(oracle, torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), model="linear")
        >>> found.finite, notes
        (True, [])
    """
    notes: list[Check] = []
    while True:
        try:
            return probe(oracle, images, label), notes
        except UserError:
            raise
        except Exception as error:  # the model may be the user's code, which fails in any way
            if not is_out_of_memory(error):
                raise UserError(_failure(error, oracle, len(images), model)) from error
            if len(images) == 1:
                raise
            images, label = images[: len(images) // 2], label[: len(label) // 2]
            message = f"Memory did not suffice for more than {len(images)} lanes."
            notes = [Check(name="lanes", level="note", message=message)]


def _failure(error: Exception, oracle: Oracle, n_images: int, model: str) -> str:
    if any(sign in str(error) for sign in _NO_GRADIENT):
        return (
            f"model '{model}' gives no gradient with respect to the pixels: its image encoder must be differentiable, "
            "without torch.no_grad, detach or numpy inside"
        )
    said = f"{type(error).__name__}: {one_line(error, limit=200)}"
    return f"model '{model}' failed on a batch of {n_images} images in {oracle.precision}: {said}"

"""From `MODEL+operator:arguments` to a model with the defences the operators name, applied from left to right."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from robustvlm.defenses.saved import saved_model
from robustvlm.defenses.smoothing import DEFAULT_N0, smooth
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM, load_model, resolve_device

# A word that could be meant as an operator; file names (with a dot or a slash) and numbers never are.
_OPERATION = re.compile(r"[A-Za-z][A-Za-z_-]*(:[^/+]*)?")


@dataclass(frozen=True)
class Operation:
    """One operator of a spec with its arguments as text: `smooth:0.25:64` is ("smooth", ("0.25", "64"))."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join([self.name, *self.arguments])


@dataclass(frozen=True)
class Operator:
    """What an operator name stands for: how it is written, what it does, and the function that applies it."""

    form: str
    meaning: str
    apply: Callable[[VLM, Operation], VLM]


def split_spec(spec: str) -> tuple[str, tuple[Operation, ...]]:
    """Split a spec into the model and its operations; a path that holds a plus sign stays whole.

    Raises UserError when there are operations but no model.

    Example:
        >>> split_spec("tiny+smooth:0.25:64")
        ('tiny', (Operation(name='smooth', arguments=('0.25', '64')),))
    """
    operations: list[Operation] = []
    base = spec
    while "+" in base and not os.path.exists(os.path.expanduser(base)):
        rest, _, last = base.rpartition("+")
        if not _OPERATION.fullmatch(last):
            break
        name, *arguments = last.split(":")
        operations.insert(0, Operation(name, tuple(arguments)))
        base = rest
    if operations and not base:
        raise UserError(f"'{spec}' names no model: write MODEL+{operations[0]}, as tiny+{operations[0]}")
    return base, tuple(operations)


def load_pipeline(spec: str, *, device: str | torch.device = "cpu") -> VLM:
    """Return the model that `spec` names: any spec of `load_model`, or a folder made by this program, then +operators.

    Operators and their arguments are checked before the model is loaded. Raises UserError for an unknown operator or
    wrong arguments, and whatever `load_model` raises.

    Example:
        >>> load_pipeline("tiny+smooth:0.25:8").encode_image(torch.rand(2, 3, 64, 64)).norm(dim=-1).round(decimals=4)
        tensor([1., 1.])
    """
    base, operations = split_spec(spec)
    check_operations(spec, operations)
    made = saved_model(base)
    if made is None:
        vlm = load_model(base, device=device)
    else:
        vlm = made.encoder(resolve_device(device))
        vlm.spec = base
    return apply_operations(vlm, operations)


def apply_operations(vlm: VLM, operations: Sequence[Operation]) -> VLM:
    """Return a model with the defences that the operations name, applied from left to right.

    Example:
        >>> apply_operations(load_model("tiny"), [Operation("smooth", ("0.25", "8"))]).spec
        'tiny+smooth:0.25:8'
    """
    for operation in operations:
        vlm = OPERATORS[operation.name].apply(vlm, operation)
    return vlm


def check_operations(spec: str, operations: Sequence[Operation]) -> None:
    """Raise UserError for an unknown operator of `spec` or wrong arguments: they should not wait for a large model.

    Example:
        >>> check_operations("tiny+smooth:0.25", [Operation("smooth", ("0.25",))])
    """
    for operation in operations:
        if operation.name not in OPERATORS:
            forms = "".join(f"; MODEL+{known.form} is {known.meaning}" for known in OPERATORS.values())
            hint = nearest(operation.name, OPERATORS)
            raise UserError(f"unknown operator '+{operation.name}' in '{spec}': {hint}{forms}")
    apply_operations(_Unloaded(), operations)


class _Unloaded(VLM):
    """A stand-in that has a spec and nothing else."""

    def __init__(self) -> None:
        super().__init__(spec="MODEL", image_size=1, logit_scale=1.0)

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a stand-in encodes nothing")

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        raise NotImplementedError("a stand-in encodes nothing")


def _smooth(vlm: VLM, operation: Operation) -> VLM:
    form = OPERATORS["smooth"].form
    if not 1 <= len(operation.arguments) <= 2:
        raise UserError(f"'+{operation}' must be written +{form}, as +smooth:0.25 or +smooth:0.25:{DEFAULT_N0}")
    sigma_text, n0_text = (*operation.arguments, str(DEFAULT_N0))[:2]
    try:
        sigma = float(sigma_text)
    except ValueError:
        raise UserError(f"'+{operation}': sigma must be a number, got '{sigma_text}': as +smooth:0.25") from None
    if not re.fullmatch(r"\d{1,9}", n0_text):
        raise UserError(f"'+{operation}': the number of samples must be a whole number, got '{n0_text}'")
    return smooth(vlm, sigma, int(n0_text))


OPERATORS = {
    "smooth": Operator(
        form="smooth:SIGMA[:N0]",
        meaning=f"the model averaged over N0 noisy copies of the image (default {DEFAULT_N0}), noise of SIGMA in [0, 1]"
        " pixels",
        apply=_smooth,
    ),
}
"""Every operator by name."""

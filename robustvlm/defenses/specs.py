"""How a defended model is written: a base with operations behind it, `MODEL+name:argument`."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from robustvlm.core.registry import NOT_CODE
from robustvlm.defenses.zoo.base import DEFENCES
from robustvlm.defenses.zoo.unpublished import UNPUBLISHED
from robustvlm.errors import UserError

# A word that could be meant as an operator; file names (with a dot or a slash) and numbers never are, but noise may
# have the scales of a file.
_OPERATION = re.compile(r"([A-Za-z][A-Za-z_-]*)(:[^/+]*)?|smooth:ellipsoid@[^+]*")


# The same with digits in its name, which must be one that is known.
_NUMBERED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)(:[^/+]*)?")


@dataclass(frozen=True)
class Operation:
    """One operator of a spec with its arguments as text: `smooth:0.25:64` is ("smooth", ("0.25", "64"))."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join([self.name, *self.arguments])


def _is_path(base: str) -> bool:
    kind, _, rest = base.partition(":")
    return os.path.exists(os.path.expanduser(rest if kind in NOT_CODE else base))


def split_spec(spec: str) -> tuple[str, tuple[Operation, ...]]:
    """Split a spec into the model and its operations; a path that holds a plus sign stays whole.

    Raises UserError when there are operations but no model.

    Example:
        >>> split_spec("tiny+smooth:0.25:64")
        ('tiny', (Operation(name='smooth', arguments=('0.25', '64')),))
    """
    operations: list[Operation] = []
    base = spec
    while "+" in base and not _is_path(base):
        rest, _, last = base.rpartition("+")
        numbered = _NUMBERED.fullmatch(last)
        if not _OPERATION.fullmatch(last) and (numbered is None or numbered[1] not in DEFENCES):
            break
        name, *arguments = last.split(":")
        operations.insert(0, Operation(name, tuple(arguments)))
        base = rest
    if operations and not base:
        raise UserError(f"'{spec}' names no model: write MODEL+{operations[0]}, as tiny+{operations[0]}")
    return base, tuple(operations)


def undefended(spec: str) -> str:
    """Return a spec without its test-time defences and what follows them; one that has none as it is.

    Example:
        >>> undefended("tiny+smooth:0.1:8+bits:3+vote:4"), undefended("tiny+smooth:0.1")
        ('tiny+smooth:0.1:8', 'tiny+smooth:0.1')
    """
    base, operations = split_spec(spec)
    known = {*DEFENCES, *UNPUBLISHED}
    first = next((place for place, operation in enumerate(operations) if operation.name in known), None)
    return spec if first is None else "+".join([base, *map(str, operations[:first])])


def split_rejection(spec: str) -> tuple[str, float | None]:
    """Split `MODEL+reject:T` into the model and the threshold, None where nothing is rejected."""
    base, operations = split_spec(spec)
    if not any(operation.name == "reject" for operation in operations):
        return spec, None
    *before, last = operations
    if last.name != "reject" or any(operation.name == "reject" for operation in before):
        raise UserError(f"'+reject:T' must be the last operator of '{spec}' and stand there once")
    return "+".join([base, *map(str, before)]), _threshold(last)


def _threshold(operation: Operation) -> float:
    try:
        (text,) = operation.arguments
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"'+{operation}' must be written +reject:T with a probability 0 < T < 1, as +reject:0.5")
    return value

"""The operators of a spec: `MODEL+operator:arguments` taken apart."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from robustvlm.core.registry import NOT_CODE
from robustvlm.errors import UserError

# A word that could be meant as an operator; file names (with a dot or a slash) and numbers never are.
_OPERATION = re.compile(r"[A-Za-z][A-Za-z_-]*(:[^/+]*)?")


@dataclass(frozen=True)
class Operation:
    """One operator of a spec with its arguments as text: `smooth:0.25:64` is ("smooth", ("0.25", "64"))."""

    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join([self.name, *self.arguments])


def _is_path(base: str) -> bool:
    prefix = next((one for one in NOT_CODE if base.startswith(one)), "")
    return os.path.exists(os.path.expanduser(base.removeprefix(prefix)))


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
        if not _OPERATION.fullmatch(last):
            break
        name, *arguments = last.split(":")
        operations.insert(0, Operation(name, tuple(arguments)))
        base = rest
    if operations and not base:
        raise UserError(f"'{spec}' names no model: write MODEL+{operations[0]}, as tiny+{operations[0]}")
    return base, tuple(operations)

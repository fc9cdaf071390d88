"""The methods by name."""

from __future__ import annotations

from robustvlm.core import registry
from robustvlm.core.registry import Table
from robustvlm.defenses.finetune.methods.base import Materials, Method
from robustvlm.defenses.finetune.methods.clean import Clean
from robustvlm.defenses.finetune.methods.fare import FARE
from robustvlm.defenses.finetune.methods.hierarchical import Hierarchical
from robustvlm.defenses.finetune.methods.pmg import PMG
from robustvlm.defenses.finetune.methods.simclip import SimCLIP
from robustvlm.defenses.finetune.methods.tecoa import TeCoA
from robustvlm.errors import UserError

METHODS: Table[type[Method]] = Table(
    __package__,
    {
        "hierarchical": Hierarchical,
        "tecoa": TeCoA,
        "fare": FARE,
        "pmg": PMG,
        "simclip": SimCLIP,
        "clean": Clean,
    },
)
"""Every method, made as METHODS[name](materials, **options of its own)."""


def find_method(name: str) -> type[Method]:
    """Return a method by its name, or the class that `module:Class` names.

    Raises:
        UserError: it is neither, or no subclass of `Method`.

    Example:
        >>> find_method("tecoa").__name__
        'TeCoA'
    """
    found = registry.load(name, METHODS, "method")
    if name not in METHODS and not (isinstance(found, type) and issubclass(found, Method)):
        got = found.__name__ if isinstance(found, type) else type(found).__name__
        raise UserError(f"'{name}': expected a fine-tuning method (a subclass of robustvlm's Method), got {got}")
    return found


__all__ = ["FARE", "METHODS", "PMG", "Clean", "Hierarchical", "Materials", "Method", "SimCLIP", "TeCoA", "find_method"]

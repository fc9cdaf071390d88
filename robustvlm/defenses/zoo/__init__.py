"""Published test-time defences, re-implemented from their formulas, each one operator: `MODEL+name[:ARGS]`."""

from robustvlm.defenses.zoo.base import DEFENCES, Defence, read_defence

__all__ = ["DEFENCES", "Defence", "read_defence"]

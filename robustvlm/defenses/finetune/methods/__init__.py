"""The methods by name."""

from __future__ import annotations

from robustvlm.defenses.finetune.methods.base import Materials, Method
from robustvlm.defenses.finetune.methods.clean import Clean
from robustvlm.defenses.finetune.methods.fare import FARE
from robustvlm.defenses.finetune.methods.hierarchical import Hierarchical
from robustvlm.defenses.finetune.methods.pmg import PMG
from robustvlm.defenses.finetune.methods.simclip import SimCLIP
from robustvlm.defenses.finetune.methods.tecoa import TeCoA

METHODS: dict[str, type[Method]] = {
    "hierarchical": Hierarchical,
    "tecoa": TeCoA,
    "fare": FARE,
    "pmg": PMG,
    "simclip": SimCLIP,
    "clean": Clean,
}
"""Every method, made as METHODS[name](materials, **options of its own)."""

__all__ = ["FARE", "METHODS", "PMG", "Clean", "Hierarchical", "Materials", "Method", "SimCLIP", "TeCoA"]

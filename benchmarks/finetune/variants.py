"""What is compared: the methods, and the hierarchical one with each of its parts taken out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from robustvlm.defenses.finetune import HierarchicalOptions


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        title: as the table shows it.
        method: None: the model as it is.
        options: of the method.
        forest: use all trees, not the first alone.
        teacher: the spec of the model that it learns from.
    """

    title: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    forest: bool = False
    teacher: str | None = None


def _changed(**changes: Any) -> dict[str, Any]:
    return {"options": HierarchicalOptions(**changes)}


MAIN = {
    "zero-shot": Variant("zero-shot"),
    "clean": Variant("clean-tuned", "clean"),
    "tecoa": Variant("TeCoA", "tecoa"),
    "fare": Variant("FARE", "fare"),
    "pmg": Variant("PMG-FT", "pmg"),
    "simclip": Variant("Sim-CLIP", "simclip"),
    "agft": Variant("AGFT", "agft"),
    "ucat": Variant("UCAT", "ucat"),
    "tree": Variant("hierarchical, 1 tree", "hierarchical"),
    "forest": Variant("hierarchical, forest", "hierarchical", forest=True),
}
ABLATIONS = {
    "no-negatives": Variant("no negative-set augmentation", "hierarchical", _changed(negatives=False)),
    "leaf-only": Variant("leaf only", "hierarchical", _changed(leaf_only=True)),
    "per-level": Variant("per-level perturbations", "hierarchical", _changed(per_level=True)),
    "no-norm-order": Variant("no norm order", "hierarchical", _changed(norm_order=0.0)),
    "no-vicinity": Variant("no vicinity", "hierarchical", _changed(vicinity=0.0)),
    "midpoints": Variant("superclass texts from their classes", "hierarchical", _changed(name_superclasses=False)),
    "frozen-texts": Variant("texts not trained", "hierarchical", _changed(train_texts=False)),
}
OTHER_LOSSES = {
    "distill": Variant("distilled from tiny-robust", "distill", teacher="tiny-robust"),
    "distill-self": Variant("distilled from itself", "distill"),
    "pmg-reverse": Variant("PMG-FT, divergences reversed", "pmg", {"reverse": True}),
    "agft-authors": Variant("AGFT, the authors' constants", "agft", {"scale": 1.8, "ratio": 0.4}),
}
VARIANTS = {**MAIN, **ABLATIONS, **OTHER_LOSSES}

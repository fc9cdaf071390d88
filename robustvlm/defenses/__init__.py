"""Defences around a model, named by operators on its spec: `MODEL+smooth:0.25` is the model, smoothed."""

from robustvlm.defenses.pipeline import OPERATORS, Operation, load_pipeline, split_spec
from robustvlm.defenses.smoothing import SmoothedClassifier, SmoothedVLM, smooth

__all__ = [
    "OPERATORS",
    "Operation",
    "SmoothedClassifier",
    "SmoothedVLM",
    "load_pipeline",
    "smooth",
    "split_spec",
]

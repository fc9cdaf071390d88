"""Defences around a model, named by operators on its spec: `MODEL+smooth:0.25` is the model, smoothed."""

from robustvlm.defenses.classifier import Classifier, Refusing, ZeroShot, acceptance
from robustvlm.defenses.pipeline import OPERATORS, OwnClassifier, load_classifier, load_pipeline
from robustvlm.defenses.smoothing import SmoothedClassifier, SmoothedVLM, smooth
from robustvlm.defenses.spec import Operation, split_spec

__all__ = [
    "OPERATORS",
    "Classifier",
    "Operation",
    "OwnClassifier",
    "Refusing",
    "SmoothedClassifier",
    "SmoothedVLM",
    "ZeroShot",
    "acceptance",
    "load_classifier",
    "load_pipeline",
    "smooth",
    "split_spec",
]

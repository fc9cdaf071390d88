"""Defences around a model, named by operators on its spec: `MODEL+smooth:0.25` is the model, smoothed."""

from robustvlm.defenses.base import Classifier, ZeroShot
from robustvlm.defenses.classifier import load_classifier
from robustvlm.defenses.own import OwnClassifier
from robustvlm.defenses.pipeline import OPERATORS, Operation, load_pipeline, split_spec
from robustvlm.defenses.refusal import Refusing, acceptance
from robustvlm.defenses.smoothing import SmoothedClassifier, SmoothedVLM, smooth

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

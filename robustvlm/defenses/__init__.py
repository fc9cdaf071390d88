"""Defences around a model, named by operators on its spec: `MODEL+smooth:0.25` is the model, smoothed."""

from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.pipeline import OPERATORS, load_classifier, load_pipeline
from robustvlm.defenses.smoothing import SmoothedClassifier, SmoothedVLM, smooth
from robustvlm.defenses.specs import split_spec

__all__ = [
    "OPERATORS", "Classifier", "SmoothedClassifier", "SmoothedVLM", "load_classifier", "load_pipeline", "smooth",
    "split_spec",
]  # fmt: skip

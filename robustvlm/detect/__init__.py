"""Detection of unknown images: scores of image features, and how well they tell known from unknown.

One sign rule for every score: the higher, the more in-distribution (known). Called, the package makes a detect run.
"""

from __future__ import annotations

from robustvlm.core.callable_module import make_callable
from robustvlm.detect.base import Detector, FittedDetector, Head, ImageDetector, NotFitted, confidence, head_of
from robustvlm.detect.catalog import BASELINES, SCORES, Score, Skipped, Supplies, find_score, make_scores, parse_scores
from robustvlm.detect.distances import GDA, KNN, Mahalanobis, ViM, choose_alpha
from robustvlm.detect.logits import ASH, MCM, MSP, DeltaEnergy, Energy, MaxLogit, ReAct, energy_change, free_energy
from robustvlm.detect.metrics import (
    METRICS,
    Bootstrap,
    Difference,
    Interval,
    Metrics,
    all_metrics,
    auroc,
    auroc_interval,
    average_precision,
    difference,
    fpr_at_tpr,
    threshold_at_tpr,
)
from robustvlm.detect.mixtures import ClassMixtures, COOkeD, LinearProbe, fit_probe, mean_probabilities
from robustvlm.detect.words import SDIS, NegLabel, mine_negatives, outside, read_words, tree_words

__all__ = [
    "ASH",
    "BASELINES",
    "GDA",
    "KNN",
    "MCM",
    "METRICS",
    "MSP",
    "SCORES",
    "SDIS",
    "Bootstrap",
    "COOkeD",
    "ClassMixtures",
    "DeltaEnergy",
    "Detector",
    "Difference",
    "Energy",
    "FittedDetector",
    "Head",
    "ImageDetector",
    "Interval",
    "LinearProbe",
    "Mahalanobis",
    "MaxLogit",
    "Metrics",
    "NegLabel",
    "NotFitted",
    "ReAct",
    "Score",
    "Skipped",
    "Supplies",
    "ViM",
    "all_metrics",
    "auroc",
    "auroc_interval",
    "average_precision",
    "choose_alpha",
    "confidence",
    "difference",
    "energy_change",
    "find_score",
    "fit_probe",
    "fpr_at_tpr",
    "free_energy",
    "head_of",
    "make_scores",
    "mean_probabilities",
    "mine_negatives",
    "outside",
    "parse_scores",
    "read_words",
    "threshold_at_tpr",
    "tree_words",
]

make_callable(__name__, "robustvlm.commands.detect:detect")  # `robustvlm detect`, from Python

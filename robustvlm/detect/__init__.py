"""Detection of unknown images: scores of image features, and how well they tell known from unknown.

One sign rule for every score: the higher, the more in-distribution (known).
"""

from __future__ import annotations

from robustvlm.detect.base import Detector, FittedDetector, Head, NotFitted, confidence, head_of
from robustvlm.detect.catalog import BASELINES, SCORES, Score, Skipped, Supplies, find_score, make_scores, parse_scores
from robustvlm.detect.delta_energy import DeltaEnergy, energy_change
from robustvlm.detect.energy import Energy, MaxLogit, free_energy
from robustvlm.detect.ensemble import COOkeD, mean_probabilities
from robustvlm.detect.gda import GDA, choose_alpha
from robustvlm.detect.images import ImageDetector
from robustvlm.detect.intervals import Bootstrap, Difference, Interval, auroc_interval, difference
from robustvlm.detect.knn import KNN
from robustvlm.detect.mahalanobis import Mahalanobis
from robustvlm.detect.metrics import (
    METRICS,
    Metrics,
    all_metrics,
    auroc,
    average_precision,
    fpr_at_tpr,
    threshold_at_tpr,
)
from robustvlm.detect.mixtures import ClassMixtures
from robustvlm.detect.neglabel import NegLabel, mine_negatives
from robustvlm.detect.probe import LinearProbe, fit_probe
from robustvlm.detect.sdis import SDIS
from robustvlm.detect.shaping import ASH, ReAct
from robustvlm.detect.softmax import MCM, MSP
from robustvlm.detect.vim import ViM
from robustvlm.detect.words import outside, read_words, tree_words

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

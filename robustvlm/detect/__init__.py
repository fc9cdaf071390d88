"""Detection of unknown images: scores of image features, and how well they tell known from unknown.

One sign rule for every score: the higher, the more in-distribution (known). Called, the package makes a detect run.
"""

from robustvlm.core.registry import make_callable
from robustvlm.detect.base import Detector, FittedDetector, Head, ImageDetector, head_of
from robustvlm.detect.catalog import BASELINES, SCORES, Score, Supplies, find_score, make_scores, parse_scores
from robustvlm.detect.distances import GDA, KNN, Mahalanobis, ViM
from robustvlm.detect.geometry import class_dimensions, participation_ratio
from robustvlm.detect.krnft import KRNFT
from robustvlm.detect.logits import ASH, MCM, MSP, DeltaEnergy, Energy, MaxLogit, ReAct, energy_change
from robustvlm.detect.metrics import Bootstrap, Interval, auroc, auroc_interval, difference, threshold_at_tpr
from robustvlm.detect.mixtures import ClassMixtures, COOkeD
from robustvlm.detect.sdm import SDM
from robustvlm.detect.selective import Promise, promise
from robustvlm.detect.words import SDIS, AdaNeg, Hinge, NegLabel, outside, read_words, tree_words

__all__ = [
    "ASH", "BASELINES", "GDA", "KNN", "KRNFT", "MCM", "MSP", "SCORES", "SDIS", "SDM", "AdaNeg", "Bootstrap", "COOkeD",
    "ClassMixtures", "DeltaEnergy", "Detector", "Energy", "FittedDetector", "Head", "Hinge", "ImageDetector",
    "Interval", "Mahalanobis", "MaxLogit", "NegLabel", "Promise", "ReAct", "Score", "Supplies", "ViM", "auroc",
    "auroc_interval", "class_dimensions", "difference", "energy_change", "find_score", "head_of", "make_scores",
    "outside", "parse_scores", "participation_ratio", "promise", "read_words", "threshold_at_tpr", "tree_words",
]  # fmt: skip

make_callable(__name__, "robustvlm.commands.detect:detect")  # `robustvlm detect`, from Python

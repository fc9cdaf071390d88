"""Attacks: threat models, objectives, PGD and APGD, and the lanes that run them.

Knows nothing of models and data: any module from pixels in [0, 1] to logits can be attacked.
"""

from robustvlm.attacks.apgd import APGD, TargetedAPGD
from robustvlm.attacks.base import ATTACKS, FAILED, FOOLED, ROBUST, Job, LaneAttack, Option, Result
from robustvlm.attacks.catalog import Attack, parse_attacks, parse_second_opinion, recommended_eot
from robustvlm.attacks.engine import LaneEngine
from robustvlm.attacks.external import ExternalAttack, require_fit, require_norm
from robustvlm.attacks.external_engine import ExternalEngine
from robustvlm.attacks.fab import FAB
from robustvlm.attacks.fmn import FMN
from robustvlm.attacks.goals import (
    AcceptedMistake,
    Case,
    Deny,
    FeatureAway,
    FeatureTo,
    Goal,
    Intrude,
    Misclassify,
    Superclass,
    SuperclassAll,
    Targeted,
)
from robustvlm.attacks.objectives import Objective, margin, objective
from robustvlm.attacks.oracle import PRECISIONS, Answer, Oracle
from robustvlm.attacks.pgd import PGD
from robustvlm.attacks.probe import Probe
from robustvlm.attacks.square import Square
from robustvlm.attacks.threat import DEFAULT_EPS, ThreatModel, parse_eps, parse_norm, project

__all__ = [
    "APGD", "ATTACKS", "DEFAULT_EPS", "FAB", "FAILED", "FMN", "FOOLED", "PGD", "PRECISIONS", "ROBUST",
    "AcceptedMistake", "Answer", "Attack", "Case", "Deny", "ExternalAttack", "ExternalEngine", "FeatureAway",
    "FeatureTo", "Goal", "Intrude", "Job", "LaneAttack", "LaneEngine", "Misclassify", "Objective", "Option", "Oracle",
    "Probe", "Result", "Square", "Superclass", "SuperclassAll", "Targeted", "TargetedAPGD", "ThreatModel", "margin",
    "objective", "parse_attacks", "parse_eps", "parse_norm", "parse_second_opinion", "project", "recommended_eot",
    "require_fit", "require_norm",
]  # fmt: skip

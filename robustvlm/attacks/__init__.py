"""Attacks: threat models, objectives, PGD and APGD, and the lanes that run them.

Imports nothing of the package but errors and seeds: any module from pixels in [0, 1] to logits can be attacked.
"""

from __future__ import annotations

from robustvlm.attacks.apgd import APGD
from robustvlm.attacks.apgd_targeted import TargetedAPGD
from robustvlm.attacks.base import ATTACKS, LaneAttack
from robustvlm.attacks.external import (
    ExternalAttack,
    ExternalEngine,
    parse_external,
    parse_second_opinion,
    require_fit,
    require_norm,
)
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
from robustvlm.attacks.jobs import FAILED, FOOLED, ROBUST, Job, Result
from robustvlm.attacks.lanes import LaneEngine
from robustvlm.attacks.objectives import OBJECTIVES, Objective, margin, objective, target_classes
from robustvlm.attacks.options import Option
from robustvlm.attacks.oracle import PRECISIONS, Oracle
from robustvlm.attacks.pgd import PGD
from robustvlm.attacks.plan import PLANS, Attack, Plan, parse_attacks, recommended_eot
from robustvlm.attacks.probe import Probe, probe
from robustvlm.attacks.square import Square
from robustvlm.attacks.tally import Answer
from robustvlm.attacks.threat import DEFAULT_EPS, NORMS, ThreatModel, parse_eps, parse_norm, project

__all__ = [
    "APGD",
    "ATTACKS",
    "DEFAULT_EPS",
    "FAB",
    "FAILED",
    "FMN",
    "FOOLED",
    "NORMS",
    "OBJECTIVES",
    "PGD",
    "PLANS",
    "PRECISIONS",
    "ROBUST",
    "AcceptedMistake",
    "Answer",
    "Attack",
    "Case",
    "Deny",
    "ExternalAttack",
    "ExternalEngine",
    "FeatureAway",
    "FeatureTo",
    "Goal",
    "Intrude",
    "Job",
    "LaneAttack",
    "LaneEngine",
    "Misclassify",
    "Objective",
    "Option",
    "Oracle",
    "Plan",
    "Probe",
    "Result",
    "Square",
    "Superclass",
    "SuperclassAll",
    "Targeted",
    "TargetedAPGD",
    "ThreatModel",
    "margin",
    "objective",
    "parse_attacks",
    "parse_eps",
    "parse_external",
    "parse_norm",
    "parse_second_opinion",
    "probe",
    "project",
    "recommended_eot",
    "require_fit",
    "require_norm",
    "target_classes",
]

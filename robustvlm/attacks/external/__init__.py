"""The published attack packages as attacks of a run: torchattacks and pyautoattack on any model.

Their points are material, not verdicts: each is put into its ball and judged by our own oracle.
"""

from __future__ import annotations

from robustvlm.attacks.external.engine import ExternalEngine, Finding
from robustvlm.attacks.external.spec import (
    ExternalAttack,
    is_external,
    parse_external,
    parse_second_opinion,
    require_fit,
    require_norm,
)

__all__ = [
    "ExternalAttack",
    "ExternalEngine",
    "Finding",
    "is_external",
    "parse_external",
    "parse_second_opinion",
    "require_fit",
    "require_norm",
]

"""Antibodies: texts that say what the known classes are not, where they come from, and which of them to keep."""

from robustvlm.defenses.immunity.antibodies.filters import (
    Band,
    Dropped,
    automatic_band,
    coverage,
    filter_antibodies,
    margins,
)
from robustvlm.defenses.immunity.antibodies.sources import noise_antibodies, open_source
from robustvlm.defenses.immunity.antibodies.texts import Antibodies, AntibodyText, Proposal

__all__ = [
    "Antibodies", "AntibodyText", "Band", "Dropped", "Proposal", "automatic_band", "coverage", "filter_antibodies",
    "margins", "noise_antibodies", "open_source",
]  # fmt: skip

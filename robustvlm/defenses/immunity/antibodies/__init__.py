"""Antibodies: texts that say what the known classes are not, where they come from, and which of them to keep."""

from robustvlm.defenses.immunity.antibodies.filters import (
    Band,
    Dropped,
    Filtered,
    automatic_band,
    coverage,
    filter_antibodies,
    margins,
    nearest_angles,
)
from robustvlm.defenses.immunity.antibodies.sources import FORMS, noise_antibodies, open_source
from robustvlm.defenses.immunity.antibodies.texts import Antibodies, AntibodySource, AntibodyText, Proposal

__all__ = [
    "FORMS",
    "Antibodies",
    "AntibodySource",
    "AntibodyText",
    "Band",
    "Dropped",
    "Filtered",
    "Proposal",
    "automatic_band",
    "coverage",
    "filter_antibodies",
    "margins",
    "nearest_angles",
    "noise_antibodies",
    "open_source",
]

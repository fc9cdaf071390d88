"""Antibodies: texts that say what the known classes are not, where they come from, and which of them to keep."""

from robustvlm.defenses.immunity.antibodies.coverage import Returning, coverage, margins, neighbourhood, returning
from robustvlm.defenses.immunity.antibodies.filters import Band, Dropped, automatic_band, filter_antibodies
from robustvlm.defenses.immunity.antibodies.sources import noise_antibodies, open_source
from robustvlm.defenses.immunity.antibodies.texts import Antibodies, AntibodyText, Proposal

__all__ = [
    "Antibodies", "AntibodyText", "Band", "Dropped", "Proposal", "Returning", "automatic_band", "coverage",
    "filter_antibodies", "margins", "neighbourhood", "noise_antibodies", "open_source", "returning",
]  # fmt: skip

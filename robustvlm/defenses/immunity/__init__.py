"""The immunised classifier: prototypes, antibodies, a vaccine and thresholds around a frozen encoder (methods of
Immuno-VLM, arXiv 2605.30745)."""

from robustvlm.defenses.immunity.classifier import ImmunisedClassifier
from robustvlm.defenses.immunity.prototypes import Prototypes, fit_prototypes, text_prototypes
from robustvlm.defenses.immunity.recipe import Immunised, Labelled, immunise, immunise_without_images, text_only
from robustvlm.defenses.immunity.state import AdaptedVLM, Immunity
from robustvlm.defenses.immunity.vaccine import VaccineSettings

__all__ = [
    "AdaptedVLM", "Immunised", "ImmunisedClassifier", "Immunity", "Labelled", "Prototypes", "VaccineSettings",
    "fit_prototypes", "immunise", "immunise_without_images", "text_only", "text_prototypes",
]  # fmt: skip

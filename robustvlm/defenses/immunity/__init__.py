"""The immunised classifier: prototypes, antibodies, a vaccine and thresholds around a frozen encoder (methods of
Immuno-VLM, arXiv 2605.30745)."""

from robustvlm.defenses.immunity.classifier import Decision, ImmunisedClassifier
from robustvlm.defenses.immunity.prototypes import (
    Prototypes,
    align,
    automatic_xi,
    concentration,
    fit_prototypes,
    log_normaliser,
    text_prototypes,
)
from robustvlm.defenses.immunity.recipe import Immunised, Labelled, immunise, immunise_without_images, text_only
from robustvlm.defenses.immunity.state import AdaptedVLM, Adapter, Immunity, open_set_score
from robustvlm.defenses.immunity.thresholds import TailFit, Thresholds, fit_tail, fit_thresholds
from robustvlm.defenses.immunity.vaccine import Targets, Vaccinated, VaccineSettings, vaccinate

__all__ = [
    "AdaptedVLM",
    "Adapter",
    "Decision",
    "Immunised",
    "ImmunisedClassifier",
    "Immunity",
    "Labelled",
    "Prototypes",
    "TailFit",
    "Targets",
    "Thresholds",
    "Vaccinated",
    "VaccineSettings",
    "align",
    "automatic_xi",
    "concentration",
    "fit_prototypes",
    "fit_tail",
    "fit_thresholds",
    "immunise",
    "immunise_without_images",
    "log_normaliser",
    "open_set_score",
    "text_only",
    "text_prototypes",
    "vaccinate",
]

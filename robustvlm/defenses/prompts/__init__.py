"""Prompt tuning: context vectors learnt in front of the class names, encoders untouched (CoOp), with energy terms."""

from robustvlm.defenses.prompts.learner import PromptLearner
from robustvlm.defenses.prompts.tune import (
    Features,
    TuneSettings,
    bounded_energy_change,
    choose_shots,
    encode_source,
    masked,
    tune,
    tuning_loss,
)

__all__ = [
    "Features",
    "PromptLearner",
    "TuneSettings",
    "bounded_energy_change",
    "choose_shots",
    "encode_source",
    "masked",
    "tune",
    "tuning_loss",
]

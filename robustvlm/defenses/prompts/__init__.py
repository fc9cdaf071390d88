"""Prompt tuning: context vectors learnt in front of the class names, encoders untouched (CoOp), with energy terms."""

from robustvlm.defenses.prompts.energy import bounded_energy_change, masked, tuning_loss
from robustvlm.defenses.prompts.learner import PromptLearner
from robustvlm.defenses.prompts.shots import Features, choose_shots, encode_source
from robustvlm.defenses.prompts.tune import TuneSettings, tune

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

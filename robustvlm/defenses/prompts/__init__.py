"""Prompt tuning: context vectors learnt in front of the class names, encoders untouched (CoOp), with energy terms."""

from robustvlm.defenses.prompts.learner import PromptLearner
from robustvlm.defenses.prompts.tune import Features, TuneSettings, choose_shots, encode_source, tune

__all__ = [
    "Features",
    "PromptLearner",
    "TuneSettings",
    "choose_shots",
    "encode_source",
    "tune",
]

"""Purifier and mapper: parts around a frozen encoder that make its smoothed version strong (FS-PSM, 2601.16200).

* `unet`: the purifier, a small noise-conditioned U-Net; `denoiser`: the user's own in its place.
* `parts`: the mapper behind the encoder, the encoder between the two, as a model and on disk.
* `noise`: the noise levels, and how both are told the present one; `train`: what they are trained for.
"""

from robustvlm.defenses.purify.denoiser import OneStepDenoiser, load_denoiser
from robustvlm.defenses.purify.noise import NoiseLevels
from robustvlm.defenses.purify.parts import Parts, PurifiedVLM

__all__ = [
    "NoiseLevels",
    "OneStepDenoiser",
    "Parts",
    "PurifiedVLM",
    "load_denoiser",
]

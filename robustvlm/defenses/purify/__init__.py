"""Purifier and mapper: parts around a frozen encoder that make its smoothed version strong (FS-PSM, 2601.16200).

* `unet`: the purifier, a small noise-conditioned U-Net, and the noise levels; `denoiser`: the user's own in its place.
* `parts`: the mapper behind the encoder, the encoder between the two, as a model and on disk; `train`: what for.
"""

from robustvlm.defenses.purify.denoiser import OneStepDenoiser, load_denoiser
from robustvlm.defenses.purify.parts import Parts, PurifiedVLM
from robustvlm.defenses.purify.unet import NoiseLevels

__all__ = ["NoiseLevels", "OneStepDenoiser", "Parts", "PurifiedVLM", "load_denoiser"]

"""Purifier and mapper: parts around a frozen encoder that make its smoothed version strong (FS-PSM, 2601.16200).

* `unet`: the purifier, a small noise-conditioned U-Net; `denoiser`: the user's own in its place.
* `parts`: the mapper behind the encoder, the encoder between the two, as a model and on disk.
* `noise`: the noise levels, and how both are told the present one; `train`: what they are trained for.
"""

from robustvlm.defenses.purify.denoiser import Denoiser, OneStepDenoiser, OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.noise import NoiseLevels
from robustvlm.defenses.purify.parts import Mapper, MapperShape, Parts, PurifiedVLM
from robustvlm.defenses.purify.unet import SIZES, Purifier, PurifierShape, purifier_shape

__all__ = [
    "SIZES",
    "Denoiser",
    "Mapper",
    "MapperShape",
    "NoiseLevels",
    "OneStepDenoiser",
    "OwnDenoiser",
    "Parts",
    "PurifiedVLM",
    "Purifier",
    "PurifierShape",
    "load_denoiser",
    "purifier_shape",
]

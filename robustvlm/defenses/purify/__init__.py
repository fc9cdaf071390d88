"""Purifier and mapper: parts around a frozen encoder that make its smoothed version strong (FS-PSM, 2601.16200).

* `unet`: the purifier, a small noise-conditioned U-Net; `denoiser`, `diffusion`: the user's own in its place.
* `mapper`: the correction of the features behind the encoder. `conditioning`: how both are told the noise level.
* `vlm`: an encoder between them, as a model; `parts`, `saved`: on disk.
* `levels`, `losses`, `tasks`: what they are trained for.
"""

from robustvlm.defenses.purify.denoiser import Denoiser, OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.diffusion import OneStepDenoiser
from robustvlm.defenses.purify.levels import NoiseLevels
from robustvlm.defenses.purify.mapper import Mapper, MapperShape
from robustvlm.defenses.purify.parts import Parts
from robustvlm.defenses.purify.unet import SIZES, Purifier, PurifierShape, purifier_shape
from robustvlm.defenses.purify.vlm import PurifiedVLM

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

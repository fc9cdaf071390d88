"""Models: a spec string becomes one module with pixels in [0, 1] in and unit features out."""

from robustvlm.models.vlm import VLM, resize
from robustvlm.models.zero_shot import ZeroShotClassifier, zero_shot
from robustvlm.models.zoo import list_models, load_model

__all__ = [
    "VLM",
    "ZeroShotClassifier",
    "list_models",
    "load_model",
    "resize",
    "zero_shot",
]

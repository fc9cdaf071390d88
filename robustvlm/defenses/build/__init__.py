"""Pipelines put together from runs: purifier, encoder, mapper, smoothing, immunised head, in one folder.

* `recipe`: what belongs together; `fitting`: whether it was made for each other.
* `building`, `copying`: copies of the parts, each standing on the one before; `saved`: the folder as a model.
"""

from robustvlm.defenses.build.building import build_pipeline
from robustvlm.defenses.build.fitting import Misfit, Unfitted
from robustvlm.defenses.build.recipe import Recipe

__all__ = ["Misfit", "Recipe", "Unfitted", "build_pipeline"]

"""Pipelines put together from runs: purifier, encoder, mapper, smoothing, immunised head, in one folder.

* `fitting`: what belongs together, and whether it was made for each other.
* `building`: copies of the parts, each standing on the one before, and the folder as a model.
"""

from robustvlm.defenses.assemble.building import build_pipeline
from robustvlm.defenses.assemble.fitting import Misfit, Recipe, Unfitted

__all__ = ["Misfit", "Recipe", "Unfitted", "build_pipeline"]

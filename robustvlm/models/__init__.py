"""Models: a spec string becomes one module with pixels in [0, 1] in and unit features out."""

from robustvlm.models.vlm import VLM, resize

__all__ = ["VLM", "resize"]

"""Multimodal models that answer in words, `mllm:NAME`: an image tower, a projector and a language model.

* `model`: `MllmVLM`, from pixels to image tokens and from these to answers; `options` scores a closed question at once.
* `families`, `qwen`, `known`: the types of transformers, what each does to an image and a prompt, and why others are
  refused. `tongue`: how questions and answers are read.
* `load`: from a spec to a model; `checks`: what it has to show when it is opened. `tower`: the bundled one's.
"""

from robustvlm.models.mllm.model import MOST_WORDS, PREFIX, QUESTION, MllmVLM

__all__ = ["MOST_WORDS", "PREFIX", "QUESTION", "MllmVLM"]

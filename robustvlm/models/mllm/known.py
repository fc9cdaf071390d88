"""Which types of multimodal models are known, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustvlm.errors import UserError, nearest
from robustvlm.models.mllm.families import Family, Gemma3, InternVL, Llava, PaliGemma, VipLlava
from robustvlm.models.mllm.qwen import Qwen2VL, Qwen25VL

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "vipllava": VipLlava,
    "internvl": InternVL,
    "gemma3": Gemma3,
    "paligemma": PaliGemma,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
}
"""By `model_type`."""

ELSEWHERE = {
    "llava_next": "cuts images into tiles and a smaller copy",
    "llava_onevision": "cuts images into tiles and a smaller copy",
    "qwen3_vl": "feeds several layers of the language model from the image tower",
    "idefics3": "enlarges images before it reduces them",
    "smolvlm": "enlarges images before it reduces them",
    "blip-2": "reads an image through queries",
    "instructblip": "reads an image through queries",
    "mllama": "lets the language model look at the image in layers of its own",
}
"""Types that are not of this form, and in what."""


def family_of(config: Mapping[str, Any], spec: str) -> Family:
    """Return the family of a model by its config.

    Raises:
        UserError: one of another form; it says in what.
    """
    kind = str(config["model_type"])
    if kind in FAMILIES:
        return FAMILIES[kind].of(config)
    why = f", which {ELSEWHERE[kind]}" if kind in ELSEWHERE else ""
    close = "" if why else f" ({nearest(kind, FAMILIES)})"
    raise UserError(
        f"'{spec}' is a model of type '{kind}'{why}: mllm: takes {', '.join(FAMILIES)}{close}; write another as an "
        "encoder or classifier of your own, module:callable (docs/models.md)"
    )

"""What a multimodal model has to show when it is opened: the library's own tokens and logits, and that it looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from robustvlm.core.framing import trial_pixels
from robustvlm.errors import UserError
from robustvlm.models import transformers_files as files
from robustvlm.models.mllm.model import MllmVLM
from robustvlm.models.weights import brief

_SAME = 1e-3
"""Two ways through one model may differ by so much of the largest logit."""


def require_prompt(module: Any, folder: Path, vlm: MllmVLM, spec: str) -> None:
    """Refuse a model whose own processor makes other tokens of a question and an image than are read here."""
    family, tongue = vlm.family, vlm.tongue
    pixels = trial_pixels(1, vlm.image_size)
    picture = Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
    asked = tongue.chat(vlm.question)
    # As its `apply_chat_template` does: no second beginning.
    begun = {"add_special_tokens": False} if family.chats and tongue.begun(asked) else {}
    try:
        with files.quiet():
            processor = module.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
            told = processor(text=[asked], images=[picture], return_tensors="pt", **family.settings, **begun)
    except Exception as error:  # a processor with wrong settings fails in any way
        raise UserError(f"the processor of '{spec}' fails on a question and an image: {brief(error)}") from error
    theirs = told["input_ids"][0].tolist()
    with torch.no_grad():
        places = vlm.family.project(vlm.model.model, vlm.tokens(pixels)).shape[1]
    ours = [*vlm.prompt.before, *[tongue.image] * places, *vlm.prompt.after]
    if ours != theirs:
        raise UserError(
            f"the processor of '{spec}' makes {len(theirs)} tokens of a question and an image, and not the {len(ours)} "
            f"that are read here ({theirs.count(tongue.image)} and {places} of the image): use another model"
        )


@torch.no_grad()
def try_out(vlm: MllmVLM, spec: str) -> None:
    """Refuse a model that gives tokens or logits that are not finite, or that answers without looking at the image."""
    pixels = trial_pixels(2, vlm.image_size)
    try:
        tokens = vlm.tokens(pixels)
        logits = vlm.next_logits(tokens, torch.zeros(2, 1, dtype=torch.long))
        if not tokens.isfinite().all() or not logits.isfinite().all():
            raise UserError(f"'{spec}' gives tokens or logits that are not finite")
        _require_same(vlm, pixels[:1], logits[0, 0], spec)
    except UserError:
        raise
    except Exception as error:  # of versions of the library with a defect, or of a config that misleads
        raise UserError(
            f"'{spec}' fails under transformers {files.library().__version__}: {brief(error)}; try its newest"
        ) from error
    if torch.equal(logits[0], logits[1]):
        raise UserError(f"'{spec}' says the same of two different images to the last bit: it does not look at them")


@torch.no_grad()
def _require_same(vlm: MllmVLM, pixels: torch.Tensor, found: torch.Tensor, spec: str) -> None:
    """Refuse a model whose own forward gives other logits than the way through its parts `found` [V]."""
    before, after = (torch.tensor([part], dtype=torch.long) for part in (vlm.prompt.before, vlm.prompt.after))
    places = vlm.family.project(vlm.model.model, vlm.tokens(pixels)).shape[1]
    ids = torch.cat([before, torch.full((1, places), vlm.tongue.image), after], dim=1)
    theirs = vlm.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **vlm.family.inputs((pixels - vlm.mean) / vlm.std, before.shape[1], places, after.shape[1]),
    ).logits[0, -1]
    off = float((theirs - found).abs().max() / theirs.abs().max().clamp_min(1))
    if not off <= _SAME:
        raise UserError(
            f"'{spec}' gives other logits under transformers {files.library().__version__} than through its parts "
            f"(by {off:.1g} of the largest): try the newest"
        )

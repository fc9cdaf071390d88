"""Putting a pipeline together: copies of the parts in one folder, each standing on the one before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from robustvlm.core.foreign_text import one_line
from robustvlm.defenses.build.copying import copy_model, copy_part
from robustvlm.defenses.build.fitting import Misfit, Part, Unfitted, levels_used, misfit, read_parts_of, unfitted
from robustvlm.defenses.build.recipe import Recipe
from robustvlm.defenses.pipeline import apply_operations, load_pipeline
from robustvlm.defenses.saved import require_same_base
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, write_card

PARTS = "parts"


def build_pipeline(
    recipe: Recipe, folder: Path, *, accept_misfits: bool = False, device: torch.device | str = "cpu"
) -> tuple[VLM, tuple[Misfit | Unfitted, ...]]:
    """Copy the parts of a recipe into `folder`; return the pipeline, loaded from there, and what does not fit.

    The folder is self-contained: whatever was a folder is copied (encoder, purifier and mapper, immunised head), what
    is named otherwise (a bundled or published model, the user's own code) stays named, with its fingerprint.

    Args:
        accept_misfits: put parts together that were made for other models; they are returned.

    Raises:
        UserError: a part is missing, of another kind, made for another model, or does not work on this one.
    """
    parts = read_parts_of(recipe)
    (folder / CARD_NAME).unlink(missing_ok=True)  # not a model until all of it is there
    spec = copy_model(recipe.encoder, folder / PARTS / "encoder")
    vlm = load_pipeline(spec, device=device)
    found: list[Misfit | Unfitted] = []
    shown, clean = recipe.encoder, [vlm.fingerprint]
    for part in parts:
        wrong = misfit(part, shown, vlm.fingerprint, clean, levels_used(part, recipe.sigma))
        if wrong is None:
            require_same_base(part.card, vlm, part.folder)
        else:
            if not wrong.harmless and not accept_misfits:
                raise UserError(f"{wrong}; --accept-misfits builds it anyway")
            found.append(wrong)
        bare = unfitted(part, recipe.sigma)
        found += [] if bare is None else [bare]
        spec, vlm = _put_on(part, spec, vlm, folder / PARTS / part.name, device)
        shown, clean = str(part.folder), [*clean, vlm.fingerprint]
    _try_out(apply_operations(vlm, recipe.smoothing), recipe)
    settings = {"smooth": recipe.smooth}
    write_card(folder, Card("build", spec, vlm.fingerprint, settings, probe_encoder(vlm)))
    return load_pipeline(str(folder), device=device), tuple(found)


def _put_on(part: Part, spec: str, vlm: VLM, target: Path, device: torch.device | str) -> tuple[str, VLM]:
    """Copy a part with a card that names the model before it; return its spec and itself."""
    copy_part(part.folder, target, _on(part.card, spec, vlm))
    return str(target), load_pipeline(str(target), device=device)


def _on(card: Card, spec: str, vlm: VLM) -> Card:
    """Return the card of a part that stands on another model now, or on a copy of its own."""
    return dataclasses.replace(card, base=spec, base_fingerprint=vlm.fingerprint, base_probe=probe_encoder(vlm))


def _try_out(vlm: VLM, recipe: Recipe) -> None:
    """Encode one image with parts that may have been made for another model."""
    size = vlm.image_size
    pixels = torch.linspace(0, 1, 3 * size * size, device=vlm.device).view(1, 3, size, size)
    try:
        with torch.no_grad():
            widths = vlm.encode_image(pixels).shape[1], vlm.encode_text(["a photo"]).shape[1]
    except RuntimeError as error:
        said = one_line(error, limit=200)
        raise UserError(f"the parts do not work together on '{recipe.encoder}' ({said})") from error
    if widths[0] != widths[1]:
        raise UserError(f"the parts give image features of {widths[0]} dimensions, text features of {widths[1]}")

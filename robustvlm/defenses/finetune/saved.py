"""A fine-tuned model on disk: an open_clip folder of its own, or new weights for the encoder that it stands on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from robustvlm.defenses.finetune.trainable import plain_state
from robustvlm.defenses.saved import SavedModel
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model
from robustvlm.models.clip import ClipVLM
from robustvlm.models.clip_folder import write_clip_folder
from robustvlm.models.hub import CONFIG_NAME
from robustvlm.models.saved import Card, write_card
from robustvlm.models.weights import read_weights
from robustvlm.runs.files import replacing

OVERLAY = "weights.safetensors"


class FinetunedModel(SavedModel):
    """A model whose weights were changed and whose architecture was not: by fine-tuning, or by averaging (a soup)."""

    def encoder(self, device: torch.device) -> VLM:
        if (self.folder / CONFIG_NAME).is_file():
            return load_model(str(self.folder), device=device)
        vlm = self.base(device)
        overlay(vlm, read_weights(self.folder / OVERLAY), what=f"'{self.folder / OVERLAY}'")
        return vlm


def save_finetuned(folder: Path, vlm: VLM, card: Card) -> None:
    """Write a model with changed weights into `folder`, LoRA and SSF merged in; the card comes last.

    An open_clip model becomes a folder that open_clip reads by itself; of any other the changed weights are kept, and
    the base is needed to load it.
    """
    state = plain_state(vlm)
    if isinstance(vlm, ClipVLM):
        inner = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
        write_clip_folder(vlm, folder, state=inner)
    else:
        values = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
        with replacing(folder / OVERLAY) as temporary:
            save_file(values, temporary, metadata={"format": "pt"})
    write_card(folder, card)


@torch.no_grad()
def overlay(vlm: VLM, weights: dict[str, torch.Tensor], *, what: str) -> None:
    """Put `weights` in place of those of the same names; raise UserError where the model has no such ones."""
    own = vlm.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(f"{what} does not fit '{vlm.spec}' ('{name}'): the model it was made for is needed")
        own[name].copy_(value)

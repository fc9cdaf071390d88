"""Purifier and mapper on disk: their sizes in the card, their weights as safetensors beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from robustvlm.defenses.purify.denoiser import OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.mapper import Mapper, MapperShape
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.defenses.purify.vlm import PurifiedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.saved import Card
from robustvlm.models.weights import read_weights
from robustvlm.runs.files import replacing

PURIFIER, MAPPER = "purifier.safetensors", "mapper.safetensors"

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class Parts:
    """What is put around an encoder.

    Args:
        purifier: trained by this program, or the user's own denoiser; None: none.
        mapper: None: none.
        levels: noise levels that they are for.
    """

    purifier: Purifier | OwnDenoiser | None
    mapper: Mapper | None
    levels: tuple[float, ...]

    def around(self, base: VLM) -> PurifiedVLM:
        """Return `base` between the parts."""
        return PurifiedVLM(base, self.purifier, self.mapper)

    def settings(self) -> dict[str, Any]:
        """Return what the card has to say of the parts."""
        described: dict[str, Any] = {"sigma": list(self.levels), "purifier": None, "mapper": None}
        if isinstance(self.purifier, OwnDenoiser):
            described["denoiser"] = {"spec": self.purifier.spec, "fingerprint": self.purifier.fingerprint}
        elif self.purifier is not None:
            described["purifier"] = asdict(self.purifier.shape)
        if self.mapper is not None:
            described["mapper"] = asdict(self.mapper.shape)
        return described


def write_parts(folder: Path, parts: Parts) -> None:
    """Write the weights of the parts that have a file; the card is written by the caller, last."""
    for name, part in ((PURIFIER, parts.purifier), (MAPPER, parts.mapper)):
        if isinstance(part, (Purifier, Mapper)):
            weights = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
            with replacing(folder / name) as temporary:
                save_file(weights, temporary, metadata={"format": "pt"})


def read_parts(folder: Path, card: Card, image_size: int, device: torch.device) -> Parts:
    """Return the parts that a card describes, frozen, on `device`.

    Args:
        image_size: of the encoder they are for; a user's denoiser is tried on it.

    Raises:
        UserError: the card or a file is damaged, or a user's denoiser is gone or has changed.
    """
    settings = card.settings
    purifier: Purifier | OwnDenoiser | None = None
    if settings.get("denoiser"):
        purifier = _denoiser(folder, settings["denoiser"], image_size, device)
    elif settings.get("purifier"):
        purifier = _read(folder, PURIFIER, lambda: Purifier(_purifier_shape(settings["purifier"])))
    mapper = None
    if settings.get("mapper"):
        mapper = _read(folder, MAPPER, lambda: Mapper(MapperShape(**settings["mapper"])))
    for part in (purifier, mapper):
        if part is not None:
            part.eval().requires_grad_(False).to(device)
    return Parts(purifier, mapper, tuple(settings.get("sigma", ())))


def _purifier_shape(fields: Mapping[str, Any]) -> PurifierShape:
    return PurifierShape(**{**fields, "widths": tuple(fields["widths"])})


def _read(folder: Path, name: str, make: Callable[[], Part]) -> Part:
    """Return a part with the weights of its file."""
    try:
        part = make()
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the card of '{folder}' describes no {name.partition('.')[0]} ({error}): train it again"
        ) from None
    weights = read_weights(folder / name)
    try:
        part.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{folder / name}' does not fit its card ({reason}): train it again") from None
    return part


def _denoiser(folder: Path, facts: Mapping[str, Any], image_size: int, device: torch.device) -> OwnDenoiser:
    denoiser = load_denoiser(str(facts.get("spec")), image_size, device)
    if facts.get("fingerprint") not in (None, denoiser.fingerprint):
        raise UserError(
            f"the denoiser '{denoiser.spec}' is no longer the one that '{folder}' was made with: bring that one "
            "back, or run `robustvlm purify` again"
        )
    return denoiser

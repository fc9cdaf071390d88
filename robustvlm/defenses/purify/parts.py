"""Purifier and mapper on disk: their sizes in the card, their weights as safetensors beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from robustvlm.core.foreign_text import one_line
from robustvlm.core.user_code import named_by
from robustvlm.defenses.purify.denoiser import OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.mapper import Mapper, MapperShape
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.defenses.purify.vlm import PurifiedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.hub import brief
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
    settings = _checked(folder, card.settings)
    purifier: Purifier | OwnDenoiser | None = None
    if settings.get("denoiser"):
        purifier = _denoiser(folder, settings["denoiser"], image_size, device)
    elif settings.get("purifier"):
        purifier = _read(folder, PURIFIER, lambda: Purifier(_purifier_shape(settings["purifier"])))
    mapper = None
    if settings.get("mapper"):
        mapper = _read(folder, MAPPER, lambda: Mapper(_mapper_shape(settings["mapper"])))
    for part in (purifier, mapper):
        if part is not None:
            part.eval().requires_grad_(False).to(device)
    return Parts(purifier, mapper, tuple(settings.get("sigma", ())))


def _checked(folder: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a card if they are of the kind that cards hold."""
    levels = settings.get("sigma", [])
    if not isinstance(levels, list) or not all(_is_number(level) for level in levels):
        raise UserError(f"the card of '{folder}' must list noise levels, as [0.25], got {levels!r}: train it again")
    for name in ("denoiser", "purifier", "mapper"):
        if not isinstance(settings.get(name), dict | None):
            raise UserError(f"the card of '{folder}' describes no {name} ({settings[name]!r}): train it again")
    return settings


def _purifier_shape(fields: Mapping[str, Any]) -> PurifierShape:
    widths = fields["widths"]
    if not isinstance(widths, list) or not widths or not all(_is_count(width) for width in widths):
        raise ValueError(f"widths must be whole numbers above 0, got {widths!r}")
    _require_counts(fields, ("blocks", "stride", "embedding"))
    return PurifierShape(**{**fields, "widths": tuple(widths)})


def _mapper_shape(fields: Mapping[str, Any]) -> MapperShape:
    _require_counts(fields, ("dim", "blocks", "embedding"))
    if not _is_number(fields.get("hidden", 1.0)):
        raise ValueError(f"hidden must be a positive number, got {fields['hidden']!r}")
    return MapperShape(**fields)


def _require_counts(fields: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name in fields and not _is_count(fields[name]):
            raise ValueError(f"{name} must be a whole number above 0, got {fields[name]!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1_000_000


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _read(folder: Path, name: str, make: Callable[[], Part]) -> Part:
    """Return a part with the weights of its file."""
    try:
        part = make()
    except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"the card of '{folder}' describes no {name.partition('.')[0]} ({brief(error)}): train it again"
        ) from None
    weights = read_weights(folder / name)
    try:
        part.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error, limit=200)
        raise UserError(f"'{folder / name}' does not fit its card ({reason}): train it again") from None
    return part


def _denoiser(folder: Path, facts: Mapping[str, Any], image_size: int, device: torch.device) -> OwnDenoiser:
    with named_by(f"the card of '{folder}'"):
        denoiser = load_denoiser(str(facts.get("spec")), image_size, device)
    if facts.get("fingerprint") not in (None, denoiser.fingerprint):
        raise UserError(
            f"the denoiser '{denoiser.spec}' is no longer the one that '{folder}' was made with: bring that one "
            "back, or run `robustvlm purify` again"
        )
    return denoiser

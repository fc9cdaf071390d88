"""An immunity in a folder: tensors in one safetensors file, the rest in the card's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from robustvlm.core.reading import first_line
from robustvlm.defenses.immunity.adapter import Adapter
from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText
from robustvlm.defenses.immunity.state import Immunity
from robustvlm.errors import UserError
from robustvlm.models.weights import read_weights
from robustvlm.runs.files import replacing

TENSORS = "immunity.safetensors"


def save_tensors(folder: Path, immunity: Immunity) -> None:
    """Write prototypes, antibodies, thresholds and adapter to `immunity.safetensors`, whole or not at all."""
    tensors: dict[str, Tensor] = {
        "prototypes": immunity.prototypes,
        "antibodies": immunity.antibodies.embeddings,
        "thresholds": immunity.thresholds,
        **{f"adapter.{name}": tensor for name, tensor in immunity.adapter.state_dict().items()},
        **{f"thresholds@{sigma!r}": values for sigma, values in immunity.noisy.items()},
    }
    with replacing(folder / TENSORS) as temporary:
        temporary.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def card_settings(immunity: Immunity) -> dict[str, Any]:
    """Return what the card keeps: class names, the texts of the antibodies, their weight."""
    return {
        "class_names": list(immunity.class_names),
        "weight": immunity.weight,
        "antibodies": [[text.text, text.of_class, text.kind] for text in immunity.antibodies.texts],
    }


def load_immunity(folder: Path, settings: Mapping[str, Any]) -> Immunity:
    """Return the immunity of a folder whose card holds `settings`.

    Raises:
        UserError: the file is missing or damaged, or does not fit the card.
    """
    tensors = read_weights(folder / TENSORS)
    try:
        adapter = Adapter(tensors["prototypes"].shape[-1], len(tensors["adapter.inner.bias"]))
        prefix = "adapter."
        adapter.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
        texts = tuple(AntibodyText(*map(str, entry)) for entry in settings["antibodies"])
        noisy = {
            float(name.removeprefix("thresholds@")): tensor
            for name, tensor in tensors.items()
            if name.startswith("thresholds@")
        }
        return Immunity(
            tuple(map(str, settings["class_names"])),
            tensors["prototypes"],
            Antibodies(texts, tensors["antibodies"]),
            float(settings["weight"]),
            tensors["thresholds"],
            adapter.eval().requires_grad_(False),
            noisy,
        )
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, UserError) as error:
        raise UserError(
            f"'{folder}' is no immunised model that can be read ({first_line(error)}): make it again"
        ) from None

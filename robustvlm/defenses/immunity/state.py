"""All that an immunised model holds besides its encoder: prototypes, antibodies, adapter, thresholds; and its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from robustvlm.core.files import first_line, replacing
from robustvlm.core.seeds import derive_seed
from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText
from robustvlm.defenses.library import require_once
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.weights import read_weights
from robustvlm.text import places_of

# The vaccine: a small residual network on image features, and an encoder that ends in it


class Adapter(nn.Module):
    """f(z) = Norm(z + W2 gelu(W1 z + b1) + b2) on unit features [B, D]; W2 and b2 begin at zero, f at the identity.

    Source: Immuno-VLM, arXiv 2605.30745, phase 3. It looks at one feature at a time.

    Example:
        >>> z = F.normalize(torch.rand(2, 4), dim=-1)
        >>> torch.allclose(Adapter(4, 8, seed=0)(z), z)
        True
    """

    def __init__(self, dim: int, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return unit features [B, D]."""
        return F.normalize(features + self.outer(F.gelu(self.inner(features))), dim=-1)


class AdaptedVLM(VLM):
    """An encoder whose image features pass an adapter; texts are encoded as before.

    The adapter is part of the encoder, so that a smoothing around it averages adapted features (it is inside the
    expectation, and certificates need no property of it).

    Example:
        >>> from robustvlm.models import load_model
        >>> adapted = AdaptedVLM(load_model("tiny"), Adapter(192, 8))
        >>> adapted.encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    def __init__(self, base: VLM, adapter: Adapter) -> None:
        super().__init__(spec=base.spec, logit_scale=base.logit_scale, **base.framing.options())
        self.base, self.adapter = base, adapter
        self.training = False
        self.to(base.device)

    def at_noise(self, sigma: float) -> VLM:
        """Return the same adapter behind the encoder for that noise."""
        told = self.base.at_noise(sigma)
        return self if told is self.base else AdaptedVLM(told, self.adapter)

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.base.encode_image(pixels)
        # Under autocast the product would lose the margins that thresholds turn on.
        with torch.autocast(pixels.device.type, enabled=False):
            return self.adapter(features.to(self.adapter.inner.weight.dtype))

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.embed_text(texts)  # scaled to unit length once, by this model

    @property
    def text_fingerprint(self) -> str:
        return self.base.text_fingerprint

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    def _state(self) -> dict[str, object]:
        return dict(self.adapter.state_dict())

    def _identity(self) -> Iterable[str]:
        return ("adapted", self.base.fingerprint)


# All that an immunised model holds besides its encoder, as one value


@dataclass(frozen=True, eq=False)
class Immunity:
    """Prototypes [K, M, D], antibodies [A, D] with their weight, thresholds [K], and the adapter before them.

    Attributes:
        weight: of the antibodies in the score; floor: cosine from which they count (None: always), see
            `open_set_score`.
        noisy: thresholds [K] of S_DIS of the mean adapted feature under Gaussian noise, by its sigma.
        copies: those of the adapted features of single noisy copies, which vote, by sigma.

    Raises:
        UserError: parts that do not fit each other, or values that are not finite.
    """

    class_names: tuple[str, ...]
    prototypes: Tensor
    antibodies: Antibodies
    weight: float
    thresholds: Tensor
    adapter: Adapter
    noisy: Mapping[float, Tensor] = field(default_factory=dict)
    floor: float | None = None
    copies: Mapping[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count, dim = len(self.class_names), self.prototypes.shape[-1]
        fits = self.prototypes.ndim == 3 and len(self.prototypes) == count and self.thresholds.shape == (count,)
        fits = fits and self.antibodies.embeddings.shape[1] == dim == self.adapter.outer.out_features
        under_noise = (*self.noisy.values(), *self.copies.values())
        if not fits or any(values.shape != (count,) for values in under_noise):
            raise UserError("prototypes, antibodies, thresholds and adapter do not fit each other and the classes")
        parts = (self.prototypes, self.antibodies.embeddings, self.thresholds, *under_noise)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise UserError("prototypes, antibodies and thresholds must be finite")
        if not self.weight >= 0:
            raise UserError(f"the weight of the antibodies must not be negative, got {self.weight:g}")
        if self.floor is not None and not -1.0 <= self.floor <= 1.0:
            raise UserError(f"the floor of the antibodies is a cosine from -1 to 1, got {self.floor:g}")

    def score(self, adapted: Tensor) -> Tensor:
        """Return the open-set score [B] of adapted features [B, D]."""
        return open_set_score(adapted, self.prototypes, self.antibodies.embeddings, self.weight, self.floor)

    def ordered(self, class_names: Sequence[str], where: str) -> Immunity:
        """Return the same with classes in the order of `class_names`, which must be the same classes.

        Raises:
            UserError: other classes; `where` names the model.
        """
        places = places_of(class_names, self.class_names)
        strange = next((name for name, place in zip(class_names, places, strict=True) if place is None), None)
        missing = next((name for row, name in enumerate(self.class_names) if row not in places), None)
        if strange is not None or missing is not None:
            what = f"'{strange}' is none of them" if strange is not None else f"the data lack '{missing}'"
            raise UserError(
                f"'{where}' was immunised for {len(self.class_names)} classes and {what}: pass data with those "
                "classes, or immunise a model for these (one more class: --add-class)"
            )
        found = [place for place in places if place is not None]
        require_once(class_names, found, f"'{where}'")
        rows = torch.tensor(found, device=self.prototypes.device)
        return replace(
            self,
            class_names=tuple(class_names),
            prototypes=self.prototypes[rows],
            thresholds=self.thresholds[rows],
            noisy={sigma: values[rows] for sigma, values in self.noisy.items()},
            copies={sigma: values[rows] for sigma, values in self.copies.items()},
        )


# The open-set score: nearness to the best prototype, less what the nearest antibody takes off


def class_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of each feature [B, D] to the nearest prototype of each class [K, M, D]: [B, K].

    Example:
        >>> class_scores(torch.tensor([[0.6, 0.8]]), torch.eye(2)[:, None])
        tensor([[0.6000, 0.8000]])
    """
    return torch.einsum("bd,kmd->bkm", features, prototypes).amax(dim=2)


def antibody_score(features: Tensor, antibodies: Tensor) -> Tensor:
    """Return the cosine of each feature [B, D] to its nearest antibody [A, D]: [B]; 0 where there is none.

    Example:
        >>> antibody_score(torch.tensor([[0.6, 0.8]]), torch.zeros(0, 2))
        tensor([0.])
    """
    if not len(antibodies):
        return features.new_zeros(len(features))
    return (features @ antibodies.T).amax(dim=1)


def against(features: Tensor, antibodies: Tensor, weight: float, floor: float | None = None) -> Tensor:
    """Return what antibodies [A, D] take off the score of features [B, D]: [B]; 0 where there are none.

    Example:
        >>> against(torch.tensor([[0.6, 0.8]]), torch.eye(2)[1:], 0.5)
        tensor([0.4000])
        >>> against(torch.eye(2), torch.eye(2)[:1], 1.0, floor=0.7)
        tensor([0.3000, 0.0000])
    """
    nearest = antibody_score(features, antibodies)
    if floor is None or not len(antibodies):
        return weight * nearest
    return weight * (nearest - floor).clamp_min(0.0)


def open_set_score(
    features: Tensor, prototypes: Tensor, antibodies: Tensor, weight: float, floor: float | None = None
) -> Tensor:
    """Return how much features [B, D] look like a class: [B], higher = more like one.

    With a* = max_a <z, a>: without a floor S_DIS(z) = max_k <z, mu_k> - weight a*, the inference score of Immuno-VLM
    (arXiv 2605.30745) with lambda_inf = weight; with a floor b the hinge max_k <z, mu_k> - weight max(0, a* - b), which
    is the largest cosine wherever no antibody is nearer than b. Features are those behind the adapter.

    Example:
        >>> z, axes = torch.tensor([[0.6, 0.8]]), torch.eye(2)
        >>> open_set_score(z, axes[:1, None], axes[1:], 0.5)
        tensor([0.2000])
        >>> open_set_score(z, axes[:1, None], axes[1:], 0.5, floor=0.7)
        tensor([0.5500])
    """
    return class_scores(features, prototypes).amax(dim=1) - against(features, antibodies, weight, floor)


# An immunity in a folder: tensors in one safetensors file, the rest in the card's settings

TENSORS = "immunity.safetensors"


_MEANS, _COPIES = "thresholds@", "copies@"


def _by_level(tensors: Mapping[str, Tensor], prefix: str) -> dict[float, Tensor]:
    return {float(name.removeprefix(prefix)): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_tensors(folder: Path, immunity: Immunity) -> None:
    """Write prototypes, antibodies, thresholds and adapter to `immunity.safetensors`, whole or not at all."""
    tensors: dict[str, Tensor] = {
        "prototypes": immunity.prototypes,
        "antibodies": immunity.antibodies.embeddings,
        "thresholds": immunity.thresholds,
        **{f"adapter.{name}": tensor for name, tensor in immunity.adapter.state_dict().items()},
        **{f"{_MEANS}{sigma!r}": values for sigma, values in immunity.noisy.items()},
        **{f"{_COPIES}{sigma!r}": values for sigma, values in immunity.copies.items()},
    }
    with replacing(folder / TENSORS) as temporary:
        temporary.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def card_settings(immunity: Immunity) -> dict[str, Any]:
    """Return what the card keeps: class names, the texts of the antibodies, how they count.

    A weight alone is that of S_DIS; a hinge is kept under another key, so that no program that knows S_DIS alone takes
    one for the other.
    """
    hinge = {"hinge": {"weight": immunity.weight, "floor": immunity.floor}}
    return {
        "class_names": list(immunity.class_names),
        **({"weight": immunity.weight} if immunity.floor is None else hinge),
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
        hinge = settings.get("hinge")
        return Immunity(
            tuple(map(str, settings["class_names"])),
            tensors["prototypes"],
            Antibodies(texts, tensors["antibodies"]),
            float(settings["weight"] if hinge is None else hinge["weight"]),
            tensors["thresholds"],
            adapter.eval().requires_grad_(False),
            _by_level(tensors, _MEANS),
            None if hinge is None else float(hinge["floor"]),
            _by_level(tensors, _COPIES),
        )
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, UserError) as error:
        raise UserError(
            f"'{folder}' is no immunised model that can be read ({first_line(error)}): make it again"
        ) from None

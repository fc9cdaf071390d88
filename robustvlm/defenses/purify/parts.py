"""The mapper, the purified encoder between purifier and mapper, and both parts on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from robustvlm.core.files import replacing
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import Size
from robustvlm.core.user_code import named_by
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.defenses.purify.denoiser import OwnDenoiser, load_denoiser
from robustvlm.defenses.purify.unet import FiLM, Purifier, PurifierShape, SigmaEmbedding, as_levels, dtype_of, zeroed
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.saved import Card
from robustvlm.models.vlm import check_pixels, resize
from robustvlm.models.weights import brief, read_weights
from robustvlm.text import one_line

# The smoothness mapper: a noise-conditioned correction of features towards those of the clean image


@dataclass(frozen=True)
class MapperShape:
    """Sizes of a mapper.

    Args:
        dim: length D of the features.
        hidden: width of the hidden layers, as a multiple of D.
        blocks: residual blocks.
        embedding: length of the noise embedding.
        tokens: features are so many unit tokens of length D side by side, over the root of their number, and each is
            corrected by itself.
    """

    dim: int
    hidden: float = 2.0
    blocks: int = 2
    embedding: int = 64
    tokens: int = field(default=1, repr=False)

    def described(self) -> dict[str, Any]:
        """Return the sizes for a card; a mapper of whole features is described as before there were others."""
        return {name: value for name, value in asdict(self).items() if name != "tokens" or value > 1}


class Mapper(nn.Module):
    """Unit features [B, D] of noisy images and their noise level to features [B, D] nearer to those of clean images.

    M(z, s) = z + g(s) f(z, s), g(s) = s / sqrt(s^2 + 1/16): residual blocks with FiLM on s whose last layers start at
    zero, so that training starts at the identity. At s = 0 it is the identity exactly, whatever its weights; in FS-PSM
    (arXiv 2601.16200) that is a penalty, here it is built in (our reading). Row by row; no batch statistics.

    Example:
        >>> import torch
        >>> mapper, z = Mapper(MapperShape(dim=8)), torch.rand(3, 8)
        >>> torch.equal(mapper(z, 0.25), z), torch.equal(mapper(z, 0.0), z)
        (True, True)
    """

    def __init__(self, shape: MapperShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = SigmaEmbedding(shape.embedding)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.blocks))

    def forward(self, features: Tensor, sigma: Tensor | float) -> Tensor:
        """Return features for noise levels [B], or one for all; not normalised."""
        levels, count = as_levels(sigma, features), self.shape.tokens
        embedding = self.embed(levels).repeat_interleave(count, dim=0)
        scale = math.sqrt(count)
        rows = scale * features.reshape(-1, self.shape.dim)
        z = rows
        for block in self.blocks:
            z = z + block(z, embedding).to(z.dtype)
        gate = levels / (levels**2 + 1 / 16).sqrt()
        return features + gate[:, None].to(z.dtype) * ((z - rows) / scale).view_as(features)

    def unit(self, features: Tensor, sigma: Tensor | float) -> Tensor:
        """Return features for noise levels at unit norm; of several tokens each has the same length, as it came."""
        count = self.shape.tokens
        rows = F.normalize(self(features, sigma).reshape(len(features), count, -1), dim=-1)
        return rows.flatten(1) / math.sqrt(count)


class _Block(nn.Module):
    """Norm, widen, FiLM, narrow; the last layer starts at zero."""

    def __init__(self, shape: MapperShape) -> None:
        super().__init__()
        hidden = round(shape.hidden * shape.dim)
        self.norm, self.first = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, hidden)
        self.film, self.second = FiLM(shape.embedding, hidden), zeroed(nn.Linear(hidden, shape.dim))

    def forward(self, z: Tensor, embedding: Tensor) -> Tensor:
        hidden = self.first(self.norm(z.to(dtype_of(self.first))))
        return self.second(F.gelu(self.film(hidden, embedding)))


# The purified encoder: denoise, encode, map; told the noise level by whoever adds the noise


class PurifiedVLM(VLM):
    """An encoder between a purifier and a mapper: f(x) = M(phi(P(x, s)), s) at unit norm, for noise of s.

    Made for noise 0, where it is the encoder itself. Whoever smooths it asks for `at_noise(sigma)`, so purifier and
    mapper see single noisy images and are part of what is averaged: certificates need no property of them (they must
    be functions of one image, which `certify` checks).

    Args:
        base: the encoder; it encodes texts unchanged.
        purifier: `Purifier`, `OwnDenoiser` or None.
        mapper: `Mapper` or None.
        sigma: noise level behind which this one stands.

    Example:
        >>> import torch
        >>> from robustvlm.defenses.purify.unet import PurifierShape
        >>> from robustvlm.models import load_model
        >>> base, pixels = load_model("tiny"), torch.rand(1, 3, 64, 64)
        >>> vlm = PurifiedVLM(base, Purifier(PurifierShape(widths=(8,))), None)
        >>> torch.allclose(vlm.encode_image(pixels), base.encode_image(pixels))
        True
        >>> torch.allclose(vlm.at_noise(0.25).encode_image(pixels), base.encode_image(pixels))
        False
    """

    def __init__(
        self, base: VLM, purifier: Purifier | OwnDenoiser | None, mapper: Mapper | None, *, sigma: float = 0.0
    ) -> None:
        super().__init__(spec=base.spec, logit_scale=base.logit_scale, **base.framing.options())
        # Behind a purifier of ours the encoder meets denoised images, so a purifier of its own is not told the noise.
        self.base = base if purifier is not None else base.at_noise(sigma)
        self.purifier, self.mapper, self.sigma = purifier, mapper, float(sigma)
        self.eval()
        self.to(base.device)

    asks_for_noise = True

    def at_noise(self, sigma: float) -> PurifiedVLM:
        """Return the same model behind noise of `sigma`; the weights are shared."""
        same = PurifiedVLM(self.base, self.purifier, self.mapper, sigma=sigma)
        same.spec = self.spec
        return same

    def _image_features(self, pixels: Tensor) -> Tensor:
        features = self.base.encode_image(self._purified(pixels))
        if self.mapper is None or self.sigma == 0.0:
            return features
        # Of one token the caller does it.
        mapped = self.mapper if self.mapper.shape.tokens == 1 else self.mapper.unit
        return mapped(features, self.sigma)

    def ask_below(self, ask: Callable[[VLM, Tensor], Tensor], pixels: Tensor) -> Tensor | None:
        if self.mapper is not None and self.sigma > 0.0:
            return None
        check_pixels(pixels, self.image_size)
        return ask(self.base, self._purified(resize(pixels, self.image_size, self.interpolation)))

    def _purified(self, pixels: Tensor) -> Tensor:
        return pixels if self.purifier is None or self.sigma == 0.0 else self.purifier(pixels, self.sigma)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.encode_text(texts)

    @property
    def text_fingerprint(self) -> str:
        return f"{self.base.text_fingerprint} scaled to unit norm twice"

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        # A mapper leads back to the features of clean images, which these vectors are for.
        return self.base.class_vectors(class_names)

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    @property
    def fingerprint(self) -> str:
        """Digest of the encoder, of purifier and mapper, and of the noise level."""
        return fingerprint({}, (self.base.fingerprint, "purify", repr(self.sigma), super().fingerprint))

    def _state(self) -> Mapping[str, object]:
        state: dict[str, Any] = {}
        for name, part in (("purifier", self.purifier), ("mapper", self.mapper)):
            own = part.state if isinstance(part, OwnDenoiser) else {} if part is None else part.state_dict()
            state |= {f"{name}.{key}": value for key, value in own.items()}
        return state

    def _identity(self) -> Iterable[str]:
        return (_structure(self.purifier), _structure(self.mapper))


def _structure(part: nn.Module | None) -> str:
    if isinstance(part, OwnDenoiser):
        return f"denoiser {part.fingerprint}"
    tokens = part.shape.tokens if isinstance(part, Mapper) else 1
    over = f" over {tokens} unit tokens" if tokens > 1 else ""
    return "none" if part is None else f"{type(part).__name__} {getattr(part, 'shape', '')!r}{over}"


# Purifier and mapper on disk: their sizes in the card, their weights as safetensors beside it

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
            described["mapper"] = self.mapper.shape.described()
        return described


def write_parts(folder: Path, parts: Parts) -> None:
    """Write the weights of the parts that have a file; the card is written by the caller, last."""
    for name, part in ((PURIFIER, parts.purifier), (MAPPER, parts.mapper)):
        if isinstance(part, (Purifier, Mapper)):
            weights = {key: tensor.detach().cpu().contiguous() for key, tensor in part.state_dict().items()}
            with replacing(folder / name) as temporary:
                save_file(weights, temporary, metadata={"format": "pt"})


def read_parts(folder: Path, card: Card, image_size: Size, device: torch.device) -> Parts:
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
    _require_counts(fields, ("dim", "blocks", "embedding", "tokens"))
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


def _denoiser(folder: Path, facts: Mapping[str, Any], image_size: Size, device: torch.device) -> OwnDenoiser:
    with named_by(f"the card of '{folder}'"):
        denoiser = load_denoiser(str(facts.get("spec")), image_size, device)
    if facts.get("fingerprint") not in (None, denoiser.fingerprint):
        raise UserError(
            f"the denoiser '{denoiser.spec}' is no longer the one that '{folder}' was made with: bring that one "
            "back, or run `robustvlm purify` again"
        )
    return denoiser


# A folder of kind `purify` as a model


class PurifiedModel(SavedModel):
    """The base model between its purifier and its mapper."""

    def encoder(self, device: torch.device) -> PurifiedVLM:
        base = self.base(device)
        return self.parts(base.image_size, device).around(base)

    def parts(self, image_size: Size, device: torch.device) -> Parts:
        """Return purifier and mapper, to be put around another encoder."""
        return read_parts(self.folder, self.card, image_size, device)

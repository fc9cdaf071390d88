"""The one interface to every vision-language model: pixels or texts in, unit features out; and on which device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from robustvlm.core.framing import Framing
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import Size, sides, size_text
from robustvlm.errors import UserError, nearest

# The one interface to every vision-language model: pixels in [0, 1] or texts in, unit features out

INTERPOLATIONS = ("bicubic", "bilinear")


class VLM(nn.Module, ABC):
    """An image and a text encoder with one feature space; resizing and normalisation are inside.

    A subclass implements `_image_features` (pixels [B, 3, S, S] in [0, 1], S = `image_size`, or [B, 3, H, W] where that
    is (H, W)) and `_text_features`; both may return features of any length, which are scaled to unit norm here.
    `logit_scale` is the factor on cosine similarities (the inverse of the softmax temperature). `interpolation`,
    `resize_mode`, `fill_color` and `short_side` say how an image of any shape is brought to that size (see `Framing`);
    they are handed to whoever reads the images.

    Example:
        >>> class Mean(VLM):
        ...     def _image_features(self, pixels): return pixels.mean((2, 3))
        ...     def _text_features(self, texts): return torch.eye(3)[: len(texts)]
        >>> vlm = Mean(spec="mean", image_size=4, logit_scale=10.0)
        >>> vlm.encode_image(torch.ones(2, 3, 8, 8)).square().sum(dim=-1)
        tensor([1.0000, 1.0000])
    """

    logit_bias: float | None = None
    """What a model that was trained on pairs (SigLIP) adds to `logit_scale` * cosine; the same for every class."""
    remarks: tuple[str, ...] = ()
    """What was taken for granted of the model and could not be checked: every run says it."""
    counted_at: ClassVar[str] = "_image_features"
    """The method that every image passes once, whichever of the model's answers is asked for."""
    _anchor: torch.Tensor

    def __init__(
        self,
        *,
        spec: str,
        image_size: Size,
        logit_scale: float,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        short_side: Size = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.framing = framing_of_model(spec, image_size, interpolation, resize_mode, fill_color, short_side)
        self.logit_scale = logit_scale
        # Follows .to(device) even where a model has no tensor of its own.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._known_digests: dict[str, tuple[object, str]] = {}

    @property
    def image_size(self) -> Size:
        """Side of the square that the encoder sees, or (height, width)."""
        return self.framing.image_size

    @property
    def interpolation(self) -> str:
        """Filter of every resize."""
        return self.framing.interpolation

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self._anchor.device

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return unit features [B, D] of square `pixels` [B, 3, H, H] in [0, 1]; differentiable in `pixels`.

        A model that is not square takes [B, 3, H, W] of its own size only. Raises UserError on any other shape or on
        integers.
        """
        return unit_features(self.embed_image(pixels))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit features [N, D] of `texts`, encoded as one batch. Raises UserError when there is no text."""
        return unit_features(self.embed_text(texts))

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [B, D] as the model gives them, of any length; otherwise as `encode_image`."""
        check_pixels(pixels, self.image_size)
        return self._image_features(resize(pixels, self.image_size, self.interpolation))

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Return features [N, D] as the model gives them, of any length; otherwise as `encode_text`."""
        if isinstance(texts, str) or not texts:
            raise UserError(f"encode_text takes a list of at least one text, got {texts!r}")
        return self._text_features(list(texts))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Same as `encode_image`."""
        return self.encode_image(pixels)

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text are cut off at the context length; 0 where that is not known."""
        return [0] * len(texts)

    def class_vectors(self, class_names: Sequence[str]) -> torch.Tensor | None:
        """Return unit vectors [K, D] that stand for the classes whatever the prompts; None: their texts do."""
        del class_names
        return None

    def ask_below(self, ask: Callable[[VLM, torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor | None:
        """Return what `ask` says of the model that this one stands in front of and of the pixels it hands on.

        None where features are averaged or changed behind that model, or where there is none.
        """
        del ask, pixels
        return None

    def at_noise(self, sigma: float) -> VLM:
        """Return the model to use behind Gaussian noise of `sigma`: itself, unless a part of it is told the noise."""
        del sigma
        return self

    @property
    def design(self) -> tuple[str, ...]:
        """Texts naming all that decides the features beside weights and buffers: sizes, architecture, tokenizer."""
        scale = repr(self.logit_scale)
        return size_text(self.image_size), self.interpolation, *self.framing.unusual(), scale, *self._identity()

    @property
    def fingerprint(self) -> str:
        """Digest of the weights and of all else that decides the features; hashed again only after a change."""
        return self._digest("all", self._state(), self.design)

    @property
    def text_fingerprint(self) -> str:
        """Digest of what decides the text features: models that share it give every text the same bits.

        It is that of the whole model where nothing is known of its parts.
        """
        return self.fingerprint

    def _digest(self, of: str, state: Mapping[str, object], texts: Iterable[str]) -> str:
        # An in-place update (an optimiser's step) raises a tensor's version; a new tensor has a new address.
        tensors = [t for t in state.values() if isinstance(t, torch.Tensor)]
        # Those made in inference mode count no updates.
        if any(t.is_inference() for t in tensors):
            return fingerprint(state, texts)
        stamp = tuple((t.data_ptr(), t._version) for t in tensors)
        known = self._known_digests.get(of)
        if known is None or known[0] != stamp:
            known = self._known_digests[of] = (stamp, fingerprint(state, texts))
        return known[1]

    @abstractmethod
    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [B, D] of pixels [B, 3, S, S] in [0, 1] at the model's own size."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """Return features [N, D] of at least one text."""

    def _state(self) -> Mapping[str, object]:
        """Return the weights that the fingerprint covers."""
        return self.state_dict()

    def _identity(self) -> Iterable[str]:
        """Return texts naming what the state dict does not hold (architecture, tokenizer, source code)."""
        return ()


def framing_of_model(
    spec: str, image_size: Size, interpolation: str, resize_mode: str, fill_color: int, short_side: Size = 0
) -> Framing:
    """Return how a model takes images, or raise a UserError that names the model."""
    if interpolation not in INTERPOLATIONS:
        hint = nearest(str(interpolation), INTERPOLATIONS)
        raise UserError(f"model '{spec}' asks for the unknown interpolation '{interpolation}'; {hint}")
    try:
        return Framing(image_size, interpolation, resize_mode, fill_color, short_side)
    except UserError as error:
        raise UserError(f"model '{spec}': {error}") from None


def unit_features(features: torch.Tensor) -> torch.Tensor:
    """Return features at unit norm, in float32 at least: half precision would round the norm itself."""
    wide = features if features.dtype == torch.float64 else features.float()
    return F.normalize(wide, dim=-1)


def resize(pixels: torch.Tensor, size: Size, interpolation: str = "bicubic") -> torch.Tensor:
    """Return `pixels` [B, 3, H, W] in [0, 1] at `size`, antialiased as Pillow does; differentiable.

    Bicubic overshoot is clamped to [0, 1], where an 8-bit image would be clipped too.

    Example:
        >>> resize(torch.ones(1, 3, 32, 32), 8).shape
        torch.Size([1, 3, 8, 8])
    """
    wanted = sides(size)
    if pixels.shape[-2:] == wanted:
        return pixels
    scaled = F.interpolate(pixels, wanted, mode=interpolation, antialias=True, align_corners=False)
    return scaled.clamp(0.0, 1.0)


def fitted(pixels: torch.Tensor, size: Size, interpolation: str = "bicubic") -> torch.Tensor:
    """Return `pixels` [B, 3, H, W] at the size of a model, which is `resize` of square images for a square one.

    Raises:
        UserError: the pixels would be stretched, which is not what the model's own preprocessing does.
    """
    _check_shape(tuple(pixels.shape), size)
    return resize(pixels, size, interpolation)


def _check_shape(shape: tuple[int, ...], size: Size) -> None:
    if not isinstance(size, int) and shape[-2:] != size:
        raise UserError(
            f"images must have {size_text(size)} pixels (height x width), the model's own size, got "
            f"{'x'.join(map(str, shape[-2:]))}: robustvlm.data.to_pixels brings them there by the model's `framing`"
        )
    if isinstance(size, int) and shape[-2] != shape[-1]:
        raise UserError(
            f"images must be square, got {shape[-2]}x{shape[-1]}: crop them (robustvlm.data.to_pixels does)"
        )


def check_pixels(pixels: torch.Tensor, size: Size) -> None:
    """Refuse what is no batch of images [B, 3, H, W] of floats, square ones or of the model's own size."""
    shape = tuple(pixels.shape)
    if pixels.ndim != 4 or shape[1] != 3:
        raise UserError(f"pixels must have the shape [batch, 3, height, width], got {list(shape)}")
    _check_shape(shape, size)
    if not pixels.is_floating_point():
        raise UserError(f"pixels must be floats in [0, 1], got {pixels.dtype}: divide 8-bit images by 255")

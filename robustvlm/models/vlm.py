"""The one interface to every vision-language model: pixels or texts in, unit features out; and on which device."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from robustvlm.core.framing import Framing
from robustvlm.core.ranks import Ranks
from robustvlm.errors import UserError, nearest
from robustvlm.models.weights import fingerprint

# The one interface to every vision-language model: pixels in [0, 1] or texts in, unit features out

INTERPOLATIONS = ("bicubic", "bilinear")


class VLM(nn.Module, ABC):
    """An image and a text encoder with one feature space; resizing and normalisation are inside.

    A subclass implements `_image_features` (pixels [B, 3, S, S] in [0, 1], S = `image_size`) and `_text_features`;
    both may return features of any length, which are scaled to unit norm here. `logit_scale` is the factor on cosine
    similarities (the inverse of the softmax temperature). `interpolation`, `resize_mode` and `fill_color` say how an
    image of any shape becomes such a square (see `Framing`); they are handed to whoever reads the images.

    Example:
        >>> class Mean(VLM):
        ...     def _image_features(self, pixels): return pixels.mean((2, 3))
        ...     def _text_features(self, texts): return torch.eye(3)[: len(texts)]
        >>> vlm = Mean(spec="mean", image_size=4, logit_scale=10.0)
        >>> vlm.encode_image(torch.ones(2, 3, 8, 8)).square().sum(dim=-1)
        tensor([1.0000, 1.0000])
    """

    _anchor: torch.Tensor

    def __init__(
        self,
        *,
        spec: str,
        image_size: int,
        logit_scale: float,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.framing = framing_of_model(spec, image_size, interpolation, resize_mode, fill_color)
        self.logit_scale = logit_scale
        # Follows .to(device) even where a model has no tensor of its own.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._known_fingerprint: tuple[object, str] | None = None

    @property
    def image_size(self) -> int:
        """Side of the square that the encoder sees."""
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

        Raises UserError on any other shape or on integers.
        """
        return _unit(self.embed_image(pixels))

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unit features [N, D] of `texts`, encoded as one batch. Raises UserError when there is no text."""
        return _unit(self.embed_text(texts))

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [B, D] as the model gives them, of any length; otherwise as `encode_image`."""
        _check_pixels(pixels)
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

    def at_noise(self, sigma: float) -> VLM:
        """Return the model to use behind Gaussian noise of `sigma`: itself, unless a part of it is told the noise."""
        del sigma
        return self

    @property
    def design(self) -> tuple[str, ...]:
        """Texts naming all that decides the features beside weights and buffers: sizes, architecture, tokenizer."""
        scale = repr(self.logit_scale)
        return str(self.image_size), self.interpolation, *self.framing.unusual(), scale, *self._identity()

    @property
    def fingerprint(self) -> str:
        """Digest of the weights and of all else that decides the features; hashed again only after a change."""
        state = self._state()
        # An in-place update (an optimiser's step) raises a tensor's version; a new tensor has a new address.
        stamp = tuple((t.data_ptr(), t._version) for t in state.values() if isinstance(t, torch.Tensor))
        if self._known_fingerprint is None or self._known_fingerprint[0] != stamp:
            self._known_fingerprint = (stamp, fingerprint(state, self.design))
        return self._known_fingerprint[1]

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


def framing_of_model(spec: str, image_size: int, interpolation: str, resize_mode: str, fill_color: int) -> Framing:
    """Return how a model takes images, or raise a UserError that names the model."""
    if interpolation not in INTERPOLATIONS:
        hint = nearest(str(interpolation), INTERPOLATIONS)
        raise UserError(f"model '{spec}' asks for the unknown interpolation '{interpolation}'; {hint}")
    try:
        return Framing(image_size, interpolation, resize_mode, fill_color)
    except UserError as error:
        raise UserError(f"model '{spec}': {error}") from None


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Return features at unit norm, in float32 at least: half precision would round the norm itself."""
    wide = features if features.dtype == torch.float64 else features.float()
    return F.normalize(wide, dim=-1)


def resize(pixels: torch.Tensor, size: int, interpolation: str = "bicubic") -> torch.Tensor:
    """Return `pixels` [B, 3, H, H] in [0, 1] at `size`, antialiased as Pillow does; differentiable.

    Bicubic overshoot is clamped to [0, 1], where an 8-bit image would be clipped too.

    Example:
        >>> resize(torch.ones(1, 3, 32, 32), 8).shape
        torch.Size([1, 3, 8, 8])
    """
    if pixels.shape[-1] == size:
        return pixels
    scaled = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True, align_corners=False)
    return scaled.clamp(0.0, 1.0)


def _check_pixels(pixels: torch.Tensor) -> None:
    shape = tuple(pixels.shape)
    if pixels.ndim != 4 or shape[1] != 3:
        raise UserError(f"pixels must have the shape [batch, 3, height, width], got {list(shape)}")
    if shape[2] != shape[3]:
        raise UserError(f"images must be square, got {shape[2]}x{shape[3]}: crop them (robustvlm.data.to_pixels does)")
    if not pixels.is_floating_point():
        raise UserError(f"pixels must be floats in [0, 1], got {pixels.dtype}: divide 8-bit images by 255")


# Which device to run on, and how exactly


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device named, or for "auto" the best there is: cuda, else mps, else cpu.

    Raises UserError when there is no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}': pass auto, cpu, cuda, cuda:0 or mps") from error
    if found.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"the device '{device}' is not one that models run on: pass auto, cpu, cuda, cuda:0 or mps")
    if found.type != "cuda" and found.index:
        raise UserError(f"the device '{device}' is not there: {found.type} is one device, pass {found.type}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"the device '{device}' is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("the device 'mps' is not there: pass auto or cpu")
    return found


def device_of_rank(device: torch.device, ranks: Ranks) -> torch.device:
    """Make the GPU with this process's local rank its current one, so that "cuda" means another one for each process.

    Raises UserError when there are fewer GPUs than processes on this machine, or one of them is named for all.

    Example:
        >>> device_of_rank(torch.device("cpu"), Ranks(rank=1, size=2, local_rank=1))
        device(type='cpu')
    """
    if ranks.size == 1 or device.type != "cuda":
        return device
    if str(device) != "cuda":
        raise UserError(f"'{device}' would be the GPU of all {ranks.size} processes: pass --device cuda")
    if ranks.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {ranks.local_rank} of this machine has no GPU, torch sees {torch.cuda.device_count()}: "
            "start one process per GPU, or pass --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank)
    return device


@contextlib.contextmanager
def full_precision_kernels() -> Iterator[None]:
    """Run float32 as float32 (no TF32, no bfloat16 within) with reproducible cuDNN kernels; restore all settings.

    Example:
        >>> with full_precision_kernels():
        ...     torch.backends.cudnn.deterministic
        True
    """
    switches = _switches()
    try:
        for put, exact, _ in switches:
            put(exact)
        yield
    finally:
        for put, _, before in switches:
            put(before)


def _switches() -> list[tuple[Callable[[Any], None], object, object]]:
    """Return torch's settings of how exactly float32 is computed: how to set one, its exact value and the present one.

    Since torch 2.9 each backend has a precision of its own; where these were set, the older flags refuse to be read.
    """
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    found: list[tuple[Callable[[Any], None], object, object]] = []
    with contextlib.suppress(RuntimeError):
        found.append((torch.set_float32_matmul_precision, "highest", torch.get_float32_matmul_precision()))
    with contextlib.suppress(RuntimeError):
        found.append((partial(setattr, cudnn, "allow_tf32"), False, cudnn.allow_tf32))
    parts: list[Any] = [torch.backends.cuda.matmul]
    parts += [getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    parts += [getattr(cudnn, name, None) for name in ("conv", "rnn")]
    for part in parts:
        if hasattr(part, "fp32_precision"):
            found.append((partial(setattr, part, "fp32_precision"), "ieee", part.fp32_precision))
    found.append((partial(setattr, cudnn, "deterministic"), True, cudnn.deterministic))
    found.append((partial(setattr, cudnn, "benchmark"), False, cudnn.benchmark))
    return found

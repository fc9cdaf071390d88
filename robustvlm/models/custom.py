"""The user's own encoder, named `module:callable`, behind the same interface as every other model."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from robustvlm.core import boundary, framing, object_graph, registry, user_code
from robustvlm.core.size import Size, as_size
from robustvlm.errors import UserError
from robustvlm.models.vlm import VLM
from robustvlm.models.weights import brief


class Encoder(Protocol):
    """What the callable of a `module:callable` spec has to return; normalisation is the encoder's own business.

    `logit_scale` is the factor on cosine similarities (CLIP's learnt parameter after exp, 100 for most). Optional
    attributes `interpolation` ("bicubic" by default, or "bilinear"), `resize_mode` ("shortest" by default, "squash",
    "longest"), `fill_color` (0) and `short_side` say how images are brought to `image_size`; see `Framing`.
    """

    image_size: Size
    logit_scale: float

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features [B, D] of pixels [B, 3, H, W] of `image_size`, in [0, 1]; differentiable."""

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Return features [N, D] of N texts."""


def framing_declared(thing: object) -> dict[str, Any]:
    """Return what a user's object says of how images are brought to its size, under the names that models take."""
    found = {name: getattr(thing, name, None) for name in ("interpolation", "resize_mode", "fill_color", "short_side")}
    return {name: value for name, value in found.items() if value is not None}


def size_declared(thing: object, spec: str) -> Size:
    """Return the image size of a user's object, a whole number or (height, width), or say what is wrong with it."""
    size = getattr(thing, "image_size", None)
    if size is None:
        raise UserError(
            f"'{spec}' has no image_size: set it to the side of the images that it takes in pixels, as image_size = 224"
            " (docs/models.md)"
        )
    return as_size(size, f"'{spec}': image_size")


_MEMBERS = ("encode_image", "encode_text", "image_size", "logit_scale")
_METHODS = ("encode_image", "encode_text", "__call__", "forward")


class _ImageSide(nn.Module):
    """A user's `encode_image` as a part of the model, which may say that it has no gradient (see `open_gradients`)."""

    def __init__(self, encoder: Any, spec: str) -> None:
        super().__init__()
        self.ask = boundary.Boundary(encoder.encode_image, what=f"encode_image of '{spec}'", parts=encoder)
        self.differentiable = getattr(encoder, "differentiable", True)
        self.surrogate = getattr(encoder, "surrogate", None)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.ask(pixels)


class CustomVLM(VLM):
    """A user's encoder; its features are scaled to unit norm, its weights frozen, its source part of its identity.

    Built on a module, it freezes and moves that very module: `wrap_encoder` takes a copy first.
    """

    def __init__(self, encoder: Any, *, spec: str) -> None:
        super().__init__(
            spec=spec,
            image_size=size_declared(encoder, spec),
            logit_scale=float(encoder.logit_scale),
            **framing_declared(encoder),
        )
        self.encoder = encoder
        # A model on disk that stands on this one is called by its folder, which may be written in more ways than one.
        self._made_by = spec
        self._hidden = Hidden(encoder)
        self.images = _ImageSide(encoder, spec)
        self.eval().requires_grad_(False)

    def settle(self, pixels: torch.Tensor) -> torch.Tensor:
        """Try the encoder out on pixels, and learn how it has to be asked."""
        return self.images.ask.settle(pixels)

    @property
    def in_half(self) -> bool:
        """Whether features are computed in half precision."""
        return self.images.ask.in_half

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.images(pixels)
        return features

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        with boundary.same_process(), user_code.no_exit(f"encode_text of '{self.spec}'"):
            return self.encoder.encode_text(texts)

    def _apply(self, fn: Any, recurse: bool = True) -> CustomVLM:
        # The precision of a user's weights is part of what is evaluated.
        return super()._apply(boundary.in_own_precision(fn), recurse)

    def _state(self) -> Mapping[str, object]:
        own = self.state_dict() if isinstance(self.encoder, nn.Module) else state_of(self.encoder)
        return own | self._hidden.state()

    def _identity(self) -> Iterable[str]:
        return self._made_by, *source_of(self.encoder)


def state_of(thing: object) -> dict[str, object]:
    """Return the tensors of a user's object, module or not, by name."""
    state: dict[str, object] = dict(thing.state_dict()) if isinstance(thing, nn.Module) else {}
    plain = hasattr(thing, "__dict__") and not isinstance(thing, nn.Module)
    for name, value in vars(thing).items() if plain else ():
        if isinstance(value, nn.Module):
            state.update({f"{name}.{key}": tensor for key, tensor in value.state_dict().items()})
        elif isinstance(value, torch.Tensor):
            state[name] = value
    return state


class Hidden:
    """The weights of a user's object where `state_of` does not look: in lists, dicts, closures, globals, arrays.

    They are found when this is made, and read as they are later. What an object hides deeper still (a file that it
    reads, a C extension) shows in its answers, see `robustvlm.core.probe`.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> class Encoder:
        ...     def __init__(self): self.parts = [net]
        >>> sorted(Hidden(Encoder()).state())
        ['/parts/0.bias', '/parts/0.weight']
    """

    def __init__(self, thing: object) -> None:
        known = {id(module) for module in _open_modules(thing)}
        seen = {id(value) for value in vars(thing).values()} if hasattr(thing, "__dict__") else set()
        try:
            reached = object_graph.Reached(thing, methods=_METHODS, private=True)
        except RecursionError:  # an object like a long chain
            self._modules, self._tensors, self._arrays = {}, {}, {}
            return
        self._modules = {path: module for path, module in reached.modules.items() if id(module) not in known}
        self._tensors = {path: tensor for path, tensor in reached.tensors.items() if id(tensor) not in seen}
        self._arrays = {path: array for path, array in reached.arrays.items() if array.dtype.kind in "biufc"}

    def state(self) -> dict[str, object]:
        """Return the tensors by how they are reached, as they are now; arrays as tensors."""
        found: dict[str, object] = dict(self._tensors)
        for path, module in self._modules.items():
            found.update({f"{path}.{name}": tensor for name, tensor in module.state_dict().items()})
        for path, array in self._arrays.items():
            found[path] = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else array.shape
        return found


def _open_modules(thing: object) -> Iterator[nn.Module]:
    """Yield the networks whose weights `state_of` returns."""
    tops = [thing] if isinstance(thing, nn.Module) else list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    for top in tops:
        if isinstance(top, nn.Module):
            yield from top.modules()


def source_of(thing: object) -> tuple[str, str]:
    """Return the name of a user's class or function and the digest of the file that it stands in."""
    kind: Any = thing if inspect.isroutine(thing) else type(thing)
    try:
        file = inspect.getsourcefile(kind) if kind.__module__ in sys.modules else None
    except TypeError:  # written in C
        file = None
    source = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return kind.__qualname__, hashlib.blake2b(source, digest_size=16).hexdigest()


def load_custom(spec: str, device: torch.device) -> CustomVLM:
    """Return the model that `module:callable` makes; the module is sought in the current folder first.

    The encoder is tried on two images and two texts. Raises UserError when the module or callable is not there or
    fails, an attribute is missing, or features have a wrong shape or are not finite.
    """
    return wrap_encoder(registry.create(spec), spec, device)


def wrap_encoder(encoder: Any, spec: str, device: torch.device) -> CustomVLM:
    """Return a user's encoder as a model, after the checks that `load_custom` makes."""
    missing = [name for name in _MEMBERS if not hasattr(encoder, name)]
    if missing:
        has = f"{type(encoder).__name__} has no {' and no '.join(missing)}"
        hint = ""
        if callable(encoder) and "encode_image" in missing:
            hint = (
                "; a classifier is taken by attack, evaluate, detect and predict, and certified from Python by "
                "rv.certify_tensors (docs/python.md)"
            )
        raise UserError(f"'{spec}' must return an object with {', '.join(_MEMBERS)}: {has}{hint}")
    size_declared(encoder, spec)
    scale = encoder.logit_scale
    if not isinstance(scale, (int, float, torch.Tensor)) or not 0 < float(scale) < math.inf:
        raise UserError(f"'{spec}': logit_scale must be a positive number (100 for most CLIPs), got {scale!r}")
    if not isinstance(encoder, nn.Module) and callable(getattr(encoder, "to", None)):
        encoder = encoder.to(device) or encoder
    # A caller may go on using what the callable returned.
    vlm = CustomVLM(boundary.own_copy(encoder), spec=spec).to(device)
    _try_out(vlm)
    return vlm


def _try_out(vlm: CustomVLM) -> None:
    pixels = framing.trial_pixels(2, vlm.image_size, device=vlm.device)
    texts = ["a photo of a cat", "a photo of a dog"]
    with torch.no_grad():
        widths = [
            _width(vlm, "encode_image", lambda: vlm.settle(pixels), f"pixels {list(pixels.shape)}"),
            _width(vlm, "encode_text", lambda: vlm.encoder.encode_text(texts), "2 texts"),
        ]
    if widths[0] != widths[1]:
        sizes = f"image features have {widths[0]} dimensions, text features {widths[1]}"
        raise UserError(f"'{vlm.spec}': {sizes}; they must share one space")


def _width(vlm: CustomVLM, name: str, run: Any, given: str) -> int:
    wanted = f"'{vlm.spec}': {name} of {given} must return finite features [2, D]"
    try:
        with user_code.no_exit(f"'{vlm.spec}'"):
            features = run()
    except UserError:
        raise
    except Exception as error:  # the user's encoder may fail in any way
        raise UserError(f"{wanted}, it raised {type(error).__name__}: {brief(error)}") from error
    if not isinstance(features, torch.Tensor):
        raise UserError(f"{wanted}, got a {type(features).__name__}")
    if features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
        raise UserError(f"{wanted}, got {features.dtype} {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise UserError(f"{wanted}, got NaN or infinite values")
    if not features.norm(dim=-1).all():
        raise UserError(f"{wanted} that are not all zero, got a row of zeros")
    return features.shape[1]

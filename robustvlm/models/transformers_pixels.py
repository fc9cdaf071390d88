"""What a processor of transformers does to an image, as geometry outside of a model and normalisation inside."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from robustvlm.core.framing import Framing, to_pixels
from robustvlm.core.size import Size, as_size, sides, size_text
from robustvlm.errors import UserError
from robustvlm.models.weights import brief

_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CHANNELS = 3
# Two implementations of one resize differ by a few grey levels of 255 at an edge; another resize by tens.
_MEAN_LEVELS, _MOST_LEVELS = 1.0, 8.0
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Preprocessing:
    """How a model takes images: the size, the values that its channels are shifted and scaled by, and patches.

    Args:
        framing: how an image of any shape is brought to the size.
        mean, std: of pixels in [0, 1].
        patch: side of a patch where the model takes rows of flat patches (SigLIP 2 NaFlex), else 0.
    """

    framing: Framing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 0


def preprocessing_of(processor: Any, spec: str) -> Preprocessing:
    """Return what an image processor of transformers does, for images of any shape.

    Raises:
        UserError: it does what this program cannot say in pixels: other filters, padding, no fixed size.
    """
    mean, std = normalisation_of(processor, spec)
    resample = filter_of(processor, spec)
    most = getattr(processor, "max_num_patches", None)
    if most:
        patch = int(processor.patch_size)
        # Its processor keeps an image's ratio, up to that many patches; of a square, this is what it makes.
        return Preprocessing(Framing(patch * math.isqrt(int(most)), resample), mean, std, patch)
    return Preprocessing(_framing(processor, resample, spec), mean, std)


def filter_of(processor: Any, spec: str) -> str:
    """Return the filter by which an image processor resizes."""
    resample = processor.resample
    resample = int(getattr(resample, "value", resample))
    if resample not in _FILTERS:
        raise UserError(
            f"the processor of '{spec}' resizes by filter {resample}: only bilinear (2) and bicubic (3) are known"
        )
    return _FILTERS[resample]


def _framing(processor: Any, interpolation: str, spec: str) -> Framing:
    if not getattr(processor, "do_resize", True):
        raise UserError(f"the processor of '{spec}' does not resize (do_resize is off): images of one size are needed")
    if getattr(processor, "do_pad", None):
        raise UserError(f"the processor of '{spec}' pads images (do_pad), which is not known here: use another model")
    size, crop = sides_of(processor.size), None
    if getattr(processor, "do_center_crop", False):
        crop = sides_of(processor.crop_size)
    short = size.get("shortest_edge")
    if short is not None and crop is None:
        raise UserError(f"the processor of '{spec}' resizes and does not crop: expected do_center_crop")
    scaled = short if short is not None else _size(size, "size", spec)
    kept = scaled if crop is None else _size(crop, "crop_size", spec)
    if any(one > other for one, other in zip(sides(kept), sides(scaled), strict=True)):
        raise UserError(
            f"the processor of '{spec}' crops {size_text(kept)} pixels out of {size_text(scaled)}: expected at most as "
            "many"
        )
    if short is None:
        if kept != scaled:
            raise UserError(
                f"the processor of '{spec}' squashes images to {size_text(scaled)} pixels and crops {size_text(kept)} "
                "of them: not known here"
            )
        return Framing(kept, interpolation, "squash")
    return Framing(kept, interpolation, short_side=scaled if scaled != kept else 0)


def sides_of(size: Any) -> dict[str, int]:
    """Return what an image processor says of a size, by name, without what it leaves open."""
    found = dict(size) if isinstance(size, Mapping) else {key: getattr(size, key, None) for key in _KEYS}
    return {key: int(value) for key, value in found.items() if value is not None}


_KEYS = ("height", "width", "shortest_edge", "longest_edge")


def _size(size: Mapping[str, int], name: str, spec: str) -> Size:
    if size.keys() != {"height", "width"}:
        raise UserError(f"the processor of '{spec}' has {name} {dict(size)}: expected height and width")
    return as_size((size["height"], size["width"]), f"{name} of the processor of '{spec}'")


def normalisation_of(processor: Any, spec: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of pixels in [0, 1], with whatever factor the processor scales levels by."""
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
    mean, std = [0.0] * _CHANNELS, [1.0] * _CHANNELS
    if getattr(processor, "do_normalize", True):
        mean, std = ([float(v) for v in _listed(value)] for value in (processor.image_mean, processor.image_std))
    good = len(mean) == len(std) == _CHANNELS and factor > 0 and all(s > 0 for s in std)
    if not good or not np.isfinite([*mean, *std, factor]).all():
        raise UserError(f"the processor of '{spec}' needs 3 numbers as image_mean and image_std, got {mean} and {std}")
    levels = 255 * factor
    return tuple(m / levels for m in mean), tuple(s / levels for s in std)


def _listed(value: Any) -> list[float]:
    return [value] * _CHANNELS if isinstance(value, (int, float)) else list(value or ())


def patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return normalised pixels [B, 3, S, S] as rows of patches [B, N, side * side * 3], the channel fastest.

    Example:
        >>> patches(torch.zeros(2, 3, 8, 8), 4).shape
        torch.Size([2, 4, 48])
    """
    cut = pixels.unfold(2, side, side).unfold(3, side, side)
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def require_equal(found: Preprocessing, processor: Any, spec: str) -> None:
    """Refuse a model whose own processor gives other values than ours, on an image of its size, a wide and a tall one.

    At the model's own size nothing is resized and the values have to agree to rounding; elsewhere as two
    implementations of one filter do.

    Raises:
        UserError: they differ, or the processor fails.
    """
    size = found.framing.image_size
    exact = found.framing == Framing(size, found.framing.interpolation, found.framing.resize_mode)
    high, wide = sides(size)
    others = [(high + high // 3, 2 * wide), (high + high // 2, wide)]
    for height, width in [(high, wide), *([] if found.patch else others)]:
        image = trial_image(width, height)
        try:
            theirs = processor(images=image, return_tensors="pt")["pixel_values"].float()
        except Exception as error:  # a processor with wrong settings fails in any way
            raise UserError(f"the processor of '{spec}' fails on an image: {brief(error)}") from error
        std = torch.tensor(found.std).view(1, -1, 1, 1)
        ours = (to_pixels(image, found.framing)[None] - torch.tensor(found.mean).view(1, -1, 1, 1)) / std
        if found.patch:
            ours = patches(ours, found.patch)
            theirs = theirs[:, : ours.shape[1]]
            std = std.view(1, 1, -1).repeat(1, 1, found.patch**2)
        same = ours.shape == theirs.shape
        if same and exact and (height, width) == (high, wide):
            same = bool((ours - theirs).abs().max() <= _ROUNDING * ours.abs().max().clamp_min(1))
        elif same:
            levels = (ours - theirs).abs() * std * 255
            same = bool(levels.mean() <= _MEAN_LEVELS and levels.max() <= _MOST_LEVELS)
        if not same:
            raise UserError(
                f"the processor of '{spec}' ({type(processor).__name__}) gives other pixels than its settings say "
                f"({found.framing.resize_mode}, {found.framing.interpolation}, {size_text(size)} pixels): use another "
                "model"
            )


def trial_image(width: int, height: int) -> Image.Image:
    """Return a smooth picture with another course in every channel and direction."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(5 * x + 2 * y), np.cos(3 * x - 4 * y), np.sin(6 * y) * x]
    return Image.fromarray(np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8))

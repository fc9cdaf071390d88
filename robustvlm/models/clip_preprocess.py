"""What an open_clip config says of preprocessing: read as open_clip reads it, and compared with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from robustvlm.core.framing import RESIZE_MODES, Framing
from robustvlm.core.reading import read_json
from robustvlm.data.pixels import to_pixels
from robustvlm.errors import UserError, nearest
from robustvlm.models.hub import CONFIG_NAME

KEYS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""What a config or a tag may say, beside the size, which is the model's own."""
_FILTERS = {"bicubic": "bicubic", "bilinear": "bilinear", "random": "bicubic"}
# Below this share of the largest value two pipelines differ by rounding only; one grey level is 4e-3.
_ROUNDING = 1e-4


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing part of a tag's or model's config, without what it leaves open.

    Example:
        >>> settings_of({"hf_hub": "timm/x/", "resize_mode": "squash", "mean": None})
        {'resize_mode': 'squash'}
    """
    return {key: config[key] for key in KEYS if config.get(key) is not None}


def check_settings(folder: Path, spec: str) -> None:
    """Refuse a folder whose `preprocess_cfg` has keys that open_clip would drop without a word."""
    from open_clip.transform import PreprocessCfg

    content = read_json(folder / CONFIG_NAME)
    found = content.get("preprocess_cfg") or {}
    known = {field.name for field in dataclasses.fields(PreprocessCfg)}
    for key, value in found.items():
        if key not in known and value is not None:
            raise UserError(
                f"preprocess_cfg of model '{spec}' has '{key}', which open_clip does not know: take it out of the "
                f"config if it changes nothing; {nearest(key, known)}"
            )
    if found.get("mode") not in (None, "RGB"):
        raise UserError(
            f"preprocess_cfg of model '{spec}' asks for images of mode {found['mode']!r}: only RGB is known"
        )


def preprocessing_of(config: Mapping[str, Any], spec: str) -> tuple[Framing, tuple[float, ...], tuple[float, ...]]:
    """Return how images are framed, and the mean and standard deviation of the channels.

    Raises:
        UserError: a value that open_clip does not know, or an image size that is not square.

    Example:
        >>> config = {"size": 32, "mean": 0.5, "std": [0.5], "interpolation": "random", "resize_mode": "squash"}
        >>> preprocessing_of(config, "m")[1:]
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    interpolation, mode = config.get("interpolation") or "bicubic", config.get("resize_mode") or "shortest"
    if interpolation not in _FILTERS:
        hint = nearest(str(interpolation), _FILTERS)
        raise UserError(f"preprocess_cfg of model '{spec}' has the unknown interpolation '{interpolation}': {hint}")
    if mode not in RESIZE_MODES:
        hint = nearest(str(mode), RESIZE_MODES)
        raise UserError(f"preprocess_cfg of model '{spec}' has the unknown resize_mode '{mode}': {hint}")
    # open_clip evaluates with bicubic where the training config says "random".
    framing = Framing(_square(config["size"], spec), _FILTERS[interpolation], mode, config.get("fill_color") or 0)
    mean = _channels(config.get("mean"), OPENAI_DATASET_MEAN, "mean", spec)
    return framing, mean, _channels(config.get("std"), OPENAI_DATASET_STD, "std", spec)


def require_equal(
    framing: Framing, mean: torch.Tensor, std: torch.Tensor, config: Mapping[str, Any], spec: str
) -> None:
    """Refuse a model for which open_clip's own transform gives other values than ours, on a wide and on a tall image.

    Whatever a config or a later open_clip may come to mean, no model is shown other pixels without a word.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    theirs = image_transform_v2(PreprocessCfg(**config), is_train=False)
    for width, height in ((96, 41), (37, 80)):
        grid = np.add.outer(np.arange(height) * 7, np.arange(width) * 5)
        image = Image.fromarray(np.stack([grid, grid * 3 + 1, grid // 2], axis=-1).astype(np.uint8))
        wanted = theirs(image)
        got = ((to_pixels(image, framing)[None] - mean.cpu()) / std.cpu())[0]
        if wanted.shape != got.shape or (wanted - got).abs().max() > _ROUNDING * wanted.abs().max().clamp_min(1):
            raise UserError(
                f"the preprocessing of model '{spec}' ({framing.resize_mode}, {framing.interpolation}, "
                f"{framing.image_size} pixels) gives other pixels than this release of open_clip does: use another one"
            )


def _channels(value: Any, default: tuple[float, ...], name: str, spec: str) -> tuple[float, ...]:
    """Return three values: a number counts for every channel, nothing stands for CLIP's own."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return tuple(default)
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and np.isfinite(v) for v in values)
    if not numbers or len(values) not in (1, 3) or (name == "std" and not all(v > 0 for v in values)):
        raise UserError(f"preprocess_cfg of model '{spec}' needs 3 numbers as {name}, got {value!r}")
    if value == 0:
        # open_clip takes a bare zero for "not given", and CLIP's own mean instead.
        raise UserError(
            f"preprocess_cfg of model '{spec}' has {name} {value!r}: write [{value!r}, {value!r}, {value!r}]"
        )
    return tuple(float(v) for v in values) * (3 // len(values))


def _square(size: Any, spec: str) -> int:
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(set(sides)) != 1:
        raise UserError(f"model '{spec}' takes images of {'x'.join(map(str, sides))}; only square inputs are supported")
    return int(sides[0])

"""What an open_clip model takes: its preprocessing as its config says it, and its tokenizer."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from robustvlm.core.files import MOST_BYTES, NotRegular, read_json, require_regular
from robustvlm.core.framing import RESIZE_MODES, Framing, to_pixels
from robustvlm.errors import UserError, nearest
from robustvlm.models.weights import CONFIG_NAME

# What an open_clip config says of preprocessing: read as open_clip reads it, and compared with its own

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


# The tokenizer of an open_clip model: its own merges file where it has one, and whether it fits the text tower

Tokenizer = Callable[[list[str]], torch.Tensor]
_FOLDER = "local-dir:"
# A vocabulary of transformers may be padded to a round number of rows, or lack reserved ones; CLIPA's fills 95 %.
_FILLED = 0.8


def load_tokenizer(source: str, folder_source: str, spec: str) -> Tokenizer:
    """Return open_clip's tokenizer for `source`, with the merges file of the model's folder if that has one.

    Raises UserError when the merges file is damaged, or when several lie there and the config names none.
    """
    import open_clip

    bpe = bpe_file(Path(folder_source.removeprefix(_FOLDER)), spec) if folder_source.startswith(_FOLDER) else None
    if bpe is not None:
        _check_merges(bpe, spec)
    # open_clip takes a merges file's path as it stands, so the folder has to be part of it.
    return open_clip.get_tokenizer(source, **({"bpe_path": str(bpe)} if bpe else {}))


def bpe_file(folder: Path, spec: str) -> Path | None:
    """Return the merges file of a model folder: the one its config names, else the only bpe_*.txt.gz beside it."""
    config = read_json(folder / CONFIG_NAME)
    text = config.get("model_cfg", {}).get("text_cfg", {})
    named = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if named:
        # A folder that was moved, or came from another machine, has the file beside its config.
        return next((path for path in (folder / Path(named).name, folder / named) if path.is_file()), folder / named)
    if text.get("hf_tokenizer_name"):
        return None
    found = sorted(folder.glob("bpe_*.txt.gz"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"model '{spec}' has several merges files ({names}): name one as text_cfg.tokenizer_kwargs.bpe_path"
        )
    return found[0] if found else None


def _check_merges(path: Path, spec: str) -> None:
    try:
        require_regular(path)
        with gzip.open(path) as file:
            if len(content := file.read(MOST_BYTES + 1)) > MOST_BYTES:
                raise NotRegular("it unpacks to more than any merges file holds")
        content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"model '{spec}' names the merges file '{path}', which is not there") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"the merges file '{path}' of model '{spec}' is damaged ({error}): fetch it again") from None


def check_vocabulary(tokenizer: Tokenizer, model: Any, text: dict[str, Any], spec: str) -> None:
    """Refuse a tokenizer that knows more tokens than the text tower, or fewer than it was trained with.

    A merges file that is cut short reads well and numbers every token anew. CLIP's own kind of tokenizer has to fit
    exactly; a vocabulary of transformers may leave a part of the rows unused.
    """
    room = _rows(model, text)
    ids = getattr(tokenizer, "encoder", None)
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(ids, dict) and ids:
        known, least = max(ids.values()) + 1, room
    elif inner is not None and hasattr(inner, "__len__"):
        known, least = len(inner), int(_FILLED * room)
    else:
        return
    if known > room or known < least:
        remedy = (
            "put the merges file it was trained with beside its config as bpe_NAME.txt.gz"
            if isinstance(ids, dict)
            else "put the tokenizer files it was trained with beside its config"
        )
        raise UserError(f"model '{spec}' has room for {room} tokens, but its tokenizer knows {known}: {remedy}")


def _rows(model: Any, text: dict[str, Any]) -> int:
    """Return the number of token embeddings of the text tower."""
    embeddings = getattr(getattr(getattr(model, "text", None), "transformer", None), "get_input_embeddings", None)
    if text.get("hf_model_name") and callable(embeddings):
        return len(embeddings().weight)
    return int(text.get("vocab_size", 49408))

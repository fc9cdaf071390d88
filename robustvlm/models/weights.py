"""Weights: fetched from a hub, read without running code from them, fitted to a model, and known by a digest."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from robustvlm.core.files import require_regular
from robustvlm.core.network import download_seconds, within
from robustvlm.errors import UserError
from robustvlm.text import without_secrets

# Reading checkpoints without running code from them, and fitting them to a model with clear errors

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the named tensors of a checkpoint file, on the CPU; nothing but tensors is ever unpickled.

    A state dict inside a training checkpoint is found, and the prefixes of DDP and torch.compile are taken off.
    Raises UserError when the file is missing, damaged, holds code, or holds anything but finite tensors.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "w.pt"
        >>> torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(1)}}, file)
        >>> read_weights(file)
        {'a': tensor([1.])}
    """
    if not path.is_file():
        raise UserError(f"no checkpoint file at '{path}'")
    if path.suffix not in SUFFIXES:
        raise UserError(f"a checkpoint file ends in {', '.join(SUFFIXES)}, got '{path.name}'")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled_tensors(path)
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"'{path}' holds no named tensors but {type(content).__name__}: save model.state_dict()")
    weights = _without_prefixes(dict(content))
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"'{path}' holds more than tensors: '{name}' is a {type(tensor).__name__}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"'{path}' is broken: '{name}' holds NaN or infinite values")
    return weights


def _read_safetensors(path: Path) -> object:
    try:
        require_regular(path)
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged or no safetensors file ({error}): fetch or save it again") from error


def _read_pickled_tensors(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Since torch 2.4 the message names a global, before a class.
        blocked = re.search(r"(?:GLOBAL:?|Unsupported class) (?:'|`)?([\w.]+)", str(error))
        if blocked:
            what = f"'{path}' would run code when loaded (it calls {blocked[1]}) and is refused"
            raise UserError(f"{what}: save its state dict as .safetensors") from error
        raise UserError(_damaged(path)) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError ... depending on where the bytes break
        if "TorchScript" in str(error):
            raise UserError(f"'{path}' is a TorchScript archive: save its state_dict() as .safetensors") from error
        raise UserError(_damaged(path)) from error


def _damaged(path: Path) -> str:
    return f"'{path}' is damaged or no torch checkpoint of plain tensors: fetch it again or save it as .safetensors"


def _without_prefixes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def fit_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Copy `weights` into an open_clip `model`, or raise UserError naming the first keys and shapes that do not fit.

    open_clip's own conversions (older layouts, other image and context sizes) are applied first.

    Example:
        >>> fit_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 3), "bias": torch.ones(1)}, what="a.pt")
        Traceback (most recent call last):
        robustvlm.errors.UserError: a.pt does not fit the model: 'weight' is [1, 3], the model needs [1, 2]
    """
    weights = _converted(model, dict(weights))
    own = model.state_dict()
    shapes = [
        f"'{name}' is {list(weights[name].shape)}, the model needs {list(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    missing = [f"'{name}' is missing" for name in own if name not in weights]
    unknown = [f"'{name}' is not part of the model" for name in weights if name not in own]
    faults = [*shapes, *missing, *unknown]
    if faults:
        more = f" ({len(faults) - 2} more)" if len(faults) > 2 else ""
        # Of each kind the first: a wrong architecture shows in all three.
        shown = [kind[0] for kind in (shapes, missing, unknown) if kind][:2] if more else faults
        raise UserError(f"{what} does not fit the model: {'; '.join(shown)}{more}")
    model.load_state_dict(weights)


def _converted(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    weights = convert_state_dict(model, weights)
    own = model.state_dict()
    if "positional_embedding" in weights and "positional_embedding" not in own:
        weights = convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        if name in weights and name in own and weights[name].numel() == 1:
            weights[name] = weights[name].reshape(own[name].shape)
    if hasattr(model, "visual"):
        # Where these fail, the checkpoint is of another width; the comparison of shapes says so in words.
        with contextlib.suppress(AssertionError, AttributeError, RuntimeError):
            resize_pos_embed(weights, model)
            resize_text_pos_embed(weights, model)
    return weights


# Fetching checkpoints from the Hugging Face hub, cached copies first, with one clear error where that fails

CONFIG_NAME = "open_clip_config.json"
_SHORT = 30.0  # seconds for one question to the hub
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


def hub_file(repo: str, names: Sequence[str], *, advice: str) -> Path:
    """Return a local path of the first file of `names` that the hub repository has; a cached copy needs no network.

    Raises UserError that ends in `advice` when nothing can be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    try:
        cached = [try_to_load_from_cache(repo, name) for name in names]
        for path in cached:
            if isinstance(path, str):
                return Path(path)
        _reach_hub()
        for name in names:
            try:
                return Path(within(download_seconds(), partial(hf_hub_download, repo, name)))
            except EntryNotFoundError:
                continue
    except Exception as error:  # the hub's client raises its own, its transport's and ValueErrors for bad names
        raise UserError(f"could not fetch '{repo}' from the Hugging Face hub ({brief(error)}): {advice}") from error
    raise UserError(f"'{repo}' on the Hugging Face hub has none of the files {', '.join(names)}: {advice}")


def tag_file(tag: dict[str, Any], *, advice: str) -> Path:
    """Return a local path of the weights that an open_clip pretrained tag's config names."""
    location = str(tag.get("hf_hub") or "")
    if location:
        repo, _, name = location.rpartition("/")
        safe = Path(name).with_suffix(".safetensors").name if name else ""
        return hub_file(repo, [safe, name] if name else WEIGHT_NAMES, advice=advice)
    from open_clip.pretrained import download_pretrained

    try:
        return Path(within(download_seconds(), partial(download_pretrained, tag)))
    except Exception as error:  # urllib's, the checksum's RuntimeError
        raise UserError(f"could not fetch '{tag.get('url')}' ({brief(error)}): {advice}") from error


def _reach_hub() -> None:
    # The client itself retries each of several files for half a minute; one short question fails at once.
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    within(_SHORT, lambda: get_session().head(ENDPOINT, timeout=10))


def brief(error: BaseException, *, limit: int = 160) -> str:
    """Return the first line of an error, cut to `limit` characters; its type where it says nothing.

    Example:
        >>> brief(ValueError("no such thing\\nand a long story"))
        'no such thing'
        >>> brief(KeyError())
        'KeyError'
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = without_secrets(line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


# The identity of a model: a digest of its weights and of what else decides its output

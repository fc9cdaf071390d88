"""A model written anew as a folder that needs nothing else: as open_clip reads it, or as transformers does.

A model of open_clip is written with its config, weights and tokenizer; one of the transformers library as a folder of
its own kind, or as an open_clip model.
"""

import gzip
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustvlm.core.boundary import same_random_state
from robustvlm.core.files import read_bytes, read_json, replacing, write_text
from robustvlm.core.framing import trial_pixels
from robustvlm.core.size import size_text
from robustvlm.errors import UserError, setting
from robustvlm.models import transformers_files as files
from robustvlm.models.clip import MERGES, ClipVLM, build_clip, settings_of
from robustvlm.models.clip_to_transformers import PROBES, ROUNDING, Translation
from robustvlm.models.transformers_load import loading_options
from robustvlm.models.transformers_vlm import TowerVLM, TransformersVLM
from robustvlm.models.weights import CONFIG_NAME, WEIGHT_NAMES, stored_weights

# A model of open_clip as its folder


def write_clip_folder(
    vlm: ClipVLM, folder: Path, *, state: Mapping[str, torch.Tensor] | None = None, half: bool = False
) -> None:
    """Write `vlm` as open_clip reads it (`local-dir:FOLDER`), each file atomically.

    open_clip takes the path of a merges file as it stands, so a tokenizer that is not CLIP's own is named by where the
    folder lies now; this program finds the file beside the config wherever the folder goes.

    Args:
        state: weights under the names of the open_clip model; default: the model's own.
        half: store floating-point weights with 16 bits; they are widened again when read.

    Raises:
        UserError: the model's tokenizer is of a kind that cannot be written.

    Example:
        >>> import tempfile
        >>> from robustvlm.models import load_model
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_clip_folder(load_model("tiny"), folder)
        >>> load_model(str(folder)).fingerprint == load_model("tiny").fingerprint
        True
        >>> sorted(path.name for path in folder.iterdir())
        ['bpe_merges.txt.gz', 'open_clip_config.json', 'open_clip_model.safetensors']
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = _write_tokenizer(vlm, folder)
    values = stored_weights(state or vlm.model.state_dict(), half=half)
    with replacing(folder / WEIGHT_NAMES[0]) as temporary:
        save_file(values, temporary, metadata={"format": "pt"})
    write_text(folder / CONFIG_NAME, json.dumps(clip_config(vlm, merges), indent=2) + "\n")


def clip_config(vlm: ClipVLM, merges: Path | None = None) -> dict[str, Any]:
    """Return what `open_clip_config.json` holds: architecture and preprocessing, without anything to fetch."""
    config, quick_gelu = json.loads(vlm.architecture)
    if merges is not None:
        config["text_cfg"]["tokenizer_kwargs"] = {
            **(config["text_cfg"].get("tokenizer_kwargs") or {}),
            "bpe_path": str(merges.resolve()),
        }
    if quick_gelu:
        config["quick_gelu"] = True
    if "timm_model_pretrained" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False
    return {"model_cfg": config, "preprocess_cfg": settings_of(vlm.model.visual.preprocess_cfg)}


def _write_tokenizer(vlm: ClipVLM, folder: Path) -> Path | None:
    """Write the tokenizer, unless it is CLIP's own, which open_clip carries; return the merges file, if any."""
    import open_clip

    tokenizer: Any = vlm.tokenizer
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        if tokenizer.bpe_ranks != open_clip.SimpleTokenizer().bpe_ranks:
            lines = ["merges", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
            with replacing(folder / MERGES) as temporary:
                # No time and no name inside: the same tokenizer gives the same bytes.
                temporary.write_bytes(gzip.compress("\n".join(lines).encode("utf-8"), mtime=0))
            return folder / MERGES
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    else:
        raise UserError(f"the tokenizer of '{vlm.spec}' is a {type(tokenizer).__name__}, which cannot be stored")
    return None


# A model of the transformers library, as a folder of its own kind or as an open_clip model

COPIED = (*files.TOKENIZER_FILES, *files.IMAGE_FILES, files.ALIGNMENT)
"""What stands in a folder beside config and weights, and is handed on byte by byte."""
_MOST = 2**28
_OWN = f"export it with {setting('to', 'transformers')}"
# What open_clip computes where its config says nothing.
_EPS = 1e-5


def inner(vlm: TransformersVLM | TowerVLM) -> nn.Module:
    """Return the library's own module: a pair of towers, or an image tower."""
    return vlm.model if isinstance(vlm, TransformersVLM) else vlm.tower


# As a folder of its own kind


def rewritten(vlm: TransformersVLM | TowerVLM, *, half: bool = False) -> Translation:
    """Return a folder of the same kind as the model's own, with the weights that it has now.

    The weights are brought to their published names by the library itself, and read back by it before they are taken.
    Of an image tower with the text side of another model, the tower is written.

    Args:
        half: store floating-point weights with 16 bits.

    Raises:
        UserError: a file of the model's folder changed since it was read, or the library reads the weights otherwise.
    """
    config = read_json(vlm.folder / files.CONFIG)
    if files.config_text(config) != vlm.config or (
        isinstance(vlm, TransformersVLM) and files.tokenizer_digest(vlm.folder) != vlm.words.digest
    ):
        raise UserError(f"'{vlm.folder}' changed since '{vlm.spec}' was read from it: export it again")
    weights = _published(inner(vlm), str(config["model_type"]), vlm.spec)
    there = [name for name in COPIED if (vlm.folder / name).is_file()]
    return Translation(
        _of_dtype(config, "float16" if half else "float32"),
        stored_weights(weights, half=half),
        {name: read_bytes(vlm.folder / name, most=_MOST) for name in there},
    )


def _published(model: Any, kind: str, spec: str) -> dict[str, torch.Tensor]:
    """Return a model's weights under the names that the library saves them by."""
    with tempfile.TemporaryDirectory() as place, files.quiet(), same_random_state():
        model.save_pretrained(place, max_shard_size="10000GB")
        found = load_file(Path(place) / files.WEIGHTS)
        back, how = type(model).from_pretrained(place, **loading_options(kind))
    own, theirs = model.state_dict(), back.state_dict()
    same = own.keys() == theirs.keys() and all(torch.equal(own[name].cpu(), theirs[name]) for name in own)
    if how.get("missing_keys") or how.get("unexpected_keys") or not same:
        version = files.library().__version__
        raise UserError(f"transformers {version} does not read back what it writes of '{spec}': try its newest")
    return found


def _of_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config that says how the weights are stored, wherever it said so before."""

    def renewed(content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        return {key: dtype if key in ("dtype", "torch_dtype") else renewed(value) for key, value in content.items()}

    found: dict[str, Any] = renewed(config)
    return found if {"dtype", "torch_dtype"} & found.keys() else found | {"torch_dtype": dtype}


# As an open_clip model


@torch.no_grad()
def as_clip(vlm: TransformersVLM) -> ClipVLM:
    """Return the open_clip model that computes the same, compared on images and texts.

    Raises:
        UserError: open_clip has no such architecture, tokenizer or preprocessing, or computes something else.
    """
    wrong = f"'{vlm.spec}' cannot be written for open_clip"
    if why := _why_not(vlm):
        raise UserError(f"{wrong}: {why}; {_OWN}")
    model: Any = vlm.model
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        save_file(stored_weights(model.state_dict()), place / WEIGHT_NAMES[0])
        _write_merges(vlm, place)
        config = {"model_cfg": _architecture(model.config), "preprocess_cfg": _preprocessing(vlm)}
        (place / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        try:
            clip = build_clip(f"local-dir:{place}", place / WEIGHT_NAMES[0], spec=vlm.spec)
        except UserError as error:
            raise UserError(f"{wrong}: {str(error).replace(f'{place}/', '')}; {_OWN}") from error
    texts = list(PROBES)
    ids, theirs = vlm.words(texts)["input_ids"], clip.tokenizer(texts)
    for text, row, other in zip(texts, ids, theirs, strict=True):
        end = int(other.argmax()) + 1
        if not torch.equal(row[:end].to(other), other[:end]):
            raise UserError(f"{wrong}: open_clip's tokenizer reads {text[:40]!r} otherwise; {_OWN}")
    pixels = trial_pixels(2, vlm.image_size, device=vlm.device)
    pairs = [
        (vlm.embed_image(pixels).cpu(), clip.embed_image(pixels.cpu())),
        (vlm.embed_text(texts).cpu(), clip.embed_text(texts)),
    ]
    for ours, given in pairs:
        if ours.shape != given.shape or (ours - given).abs().max() > ROUNDING * ours.abs().max().clamp_min(1):
            raise UserError(f"{wrong}: open_clip gives other features with its weights; {_OWN}")
    return clip


def _why_not(vlm: TransformersVLM) -> str | None:
    """Say in words why open_clip cannot be this model; None where nothing speaks against it."""
    model: Any = vlm.model
    if type(model).__name__ != "CLIPModel":
        return f"it is a {type(model).__name__}, and only a CLIPModel has a counterpart there"
    if vlm.framing.scaled != vlm.image_size:
        scaled, kept = size_text(vlm.framing.scaled), size_text(vlm.image_size)
        return f"images are scaled to {scaled} pixels and cropped to {kept}"
    acts = {model.config.vision_config.hidden_act, model.config.text_config.hidden_act}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        return f"its activation is {' and '.join(sorted(acts))}, expected gelu or quick_gelu in both towers"
    if _merges(vlm) is None:
        return "its tokenizer is not CLIP's byte-pair encoding"
    return None


def _architecture(config: Any) -> dict[str, Any]:
    image, text = config.vision_config, config.text_config
    found = {
        "embed_dim": int(config.projection_dim),
        "vision_cfg": {
            **_tower(image),
            "image_size": int(image.image_size),
            "patch_size": int(image.patch_size),
            "head_width": int(image.hidden_size) // int(image.num_attention_heads),
        },
        "text_cfg": {
            **_tower(text),
            "context_length": int(text.max_position_embeddings),
            "vocab_size": int(text.vocab_size),
            "heads": int(text.num_attention_heads),
        },
    }
    return found | ({"quick_gelu": True} if image.hidden_act == "quick_gelu" else {})


def _tower(config: Any) -> dict[str, Any]:
    width, wanted = int(config.hidden_size), int(config.intermediate_size)
    ratio = wanted / width
    while int(width * ratio) < wanted:  # open_clip rounds the product down
        ratio = math.nextafter(ratio, math.inf)
    found: dict[str, Any] = {"width": width, "layers": int(config.num_hidden_layers)}
    found |= {"mlp_ratio": int(ratio) if ratio == int(ratio) else ratio}
    eps = float(config.layer_norm_eps)
    return found if eps == _EPS else found | {"norm_kwargs": {"eps": eps}}


def _preprocessing(vlm: TransformersVLM) -> dict[str, Any]:
    framing = vlm.framing
    values = {"mean": vlm.how.mean, "std": vlm.how.std}
    listed = {name: [float(one) for one in value] for name, value in values.items()}
    return {**listed, "interpolation": framing.interpolation, "resize_mode": framing.resize_mode}


def _merges(vlm: TransformersVLM) -> list[str] | None:
    """Return the merges of a byte-pair tokenizer of CLIP's kind, two tokens a line; None for another one."""
    backend = getattr(vlm.words.tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        return None
    return [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def _write_merges(vlm: TransformersVLM, folder: Path) -> None:
    import open_clip

    lines = _merges(vlm) or []
    if lines != [" ".join(pair) for pair in open_clip.SimpleTokenizer().bpe_ranks]:
        (folder / MERGES).write_bytes(gzip.compress("\n".join(["merges", *lines]).encode("utf-8"), mtime=0))

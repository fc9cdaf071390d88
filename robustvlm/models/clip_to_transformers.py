"""An open_clip model as a folder that CLIPModel and CLIPProcessor of the transformers library read."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from robustvlm.core.boundary import same_random_state
from robustvlm.core.files import replacing, write_text
from robustvlm.core.framing import trial_pixels
from robustvlm.core.size import size_text
from robustvlm.errors import UserError, setting
from robustvlm.models.clip import ClipVLM
from robustvlm.models.transformers_files import CONFIG, WEIGHTS, library, quiet
from robustvlm.models.transformers_vlm import pooled
from robustvlm.models.weights import stored_weights

LAYOUT = (
    WEIGHTS,
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    CONFIG,
)
"""The files of such a folder, in the order in which they are written: the config last."""

_START, _END = "<|startoftext|>", "<|endoftext|>"
_FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
PROBES = (
    "a photo of a border collie, 1986",
    "Zwölf Boxkämpfer  jagen VIKTOR",
    "\N{GRINNING FACE} don't!",
    "word " * 90,
)
ROUNDING = 1e-4
_OTHER = f"export it with {setting('to', 'open_clip')}"


@dataclass(frozen=True)
class Translation:
    """What a folder holds: its config, its weights as they are stored, and the contents of its other files."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    others: dict[str, bytes]

    def write(self, folder: Path) -> None:
        """Write the files, each atomically, the config last."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / WEIGHTS) as temporary:
            save_file(self.weights, temporary, metadata={"format": "pt"})
        for name, content in self.others.items():
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
        write_text(folder / CONFIG, _json(self.config))


def translate(vlm: ClipVLM, *, half: bool = False) -> Translation:
    """Return what a folder of a model holds, after a comparison of both in memory.

    Args:
        half: store floating-point weights with 16 bits.

    Raises:
        UserError: transformers' CLIPModel cannot express the model, or the package is not installed.
    """
    module = library()
    if why := why_not(vlm):
        raise UserError(f"'{vlm.spec}' cannot be written for transformers: {why}; {_OTHER}")
    config = _config(vlm, half=half)
    state = translated(vlm.model.state_dict())
    texts = {**_tokenizer_files(vlm), "preprocessor_config.json": _json(_processor(vlm))}
    _require_same(vlm, module, config, state, texts)
    others = {name: texts[name].encode("utf-8") for name in LAYOUT[1:-1]}
    return Translation(config, stored_weights(state, half=half), others)


def why_not(vlm: ClipVLM) -> str | None:
    """Say in words why transformers' CLIPModel cannot be this model; None where nothing speaks against it."""
    import open_clip

    model, visual = vlm.model, vlm.model.visual
    if type(visual).__name__ != "VisionTransformer":
        return f"its image tower is a {type(visual).__name__}, and CLIPModel has a vision transformer"
    if type(model).__name__ != "CLIP":
        return f"it is a {type(model).__name__}, whose text tower CLIPModel does not have"
    if model.logit_bias is not None:
        return "it has a logit bias, as SigLIP has"
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        return "its image tower pools otherwise than by the class token"
    if isinstance(visual.ln_pre, nn.Identity):
        return "its image tower has no layer norm before the first layer"
    if model.text_pool_type != "argmax" or model.attn_mask is None or not torch.is_tensor(model.text_projection):
        return "its text tower pools, looks ahead or projects otherwise than CLIP's"
    if type(vlm.tokenizer) is not open_clip.SimpleTokenizer:
        return f"its tokenizer is a {type(vlm.tokenizer).__name__}, not CLIP's byte-pair encoding"
    if not isinstance(vlm.image_size, int):
        return f"it takes images of {size_text(vlm.image_size)} pixels, and CLIPVisionModel knows squares only"
    if vlm.framing.resize_mode == "longest":
        return "it pads images to a square, which CLIPImageProcessor does not"
    for name, tower in (("image", visual.transformer), ("text", model.transformer)):
        if _activation(tower) is None:
            return f"the activation of its {name} tower is not known to transformers"
    return None


def _activation(tower: Any) -> str | None:
    gelu = tower.resblocks[0].mlp.gelu
    if type(gelu).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(gelu) is nn.GELU:
        return "gelu" if gelu.approximate == "none" else "gelu_pytorch_tanh"
    return None


# Weights and their names

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IMAGE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # so it is spelt there
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def translated(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an open_clip model under transformers' names; a name that is not known stays as it is.

    Example:
        >>> sorted(translated({"visual.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(6)}))[0]
        'vision_model.encoder.layers.0.self_attn.k_proj.bias'
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name == "logit_scale":
            found[name] = value.reshape(())
        elif name == "visual.proj":
            found["visual_projection.weight"] = value.T
        elif name == "text_projection":
            found["text_projection.weight"] = value.T
        else:
            image = name.startswith("visual.")
            inner, tower = name.removeprefix("visual."), "vision_model" if image else "text_model"
            known = (_IMAGE if image else _TEXT).get(inner)
            if known is not None:
                found[f"{tower}.{known}"] = value
            elif inner.startswith("transformer.resblocks."):
                found |= _block(inner.removeprefix("transformer.resblocks."), tower, value)
            else:
                found[name] = value
    return found


def _block(name: str, tower: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    number, _, inner = name.partition(".")
    layer = f"{tower}.encoder.layers.{number}"
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    part, _, kind = inner.rpartition(".")
    return {f"{layer}.{_BLOCK.get(part, part)}.{kind}": value}


# Settings


def _config(vlm: ClipVLM, *, half: bool) -> dict[str, Any]:
    model, visual, ids = vlm.model, vlm.model.visual, vlm.tokenizer.encoder  # type: ignore[attr-defined]
    width = int(visual.proj.shape[1])
    end = max(ids.values())
    text = {
        **_tower(model.transformer, model.ln_final),
        "vocab_size": len(model.token_embedding.weight),
        "max_position_embeddings": len(model.positional_embedding),
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": width,
        "model_type": "clip_text_model",
    }
    image = {
        **_tower(visual.transformer, visual.ln_post),
        "image_size": int(visual.image_size[0]),
        "patch_size": int(visual.patch_size[0]),
        "projection_dim": width,
        "model_type": "clip_vision_model",
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float16" if half else "float32",
        "text_config": text,
        "vision_config": image,
    }


def _tower(tower: Any, norm: Any) -> dict[str, Any]:
    first = tower.resblocks[0]
    return {
        "hidden_size": int(first.attn.embed_dim),
        "intermediate_size": int(first.mlp.c_fc.weight.shape[0]),
        "num_hidden_layers": len(tower.resblocks),
        "num_attention_heads": int(first.attn.num_heads),
        "hidden_act": _activation(tower),
        "layer_norm_eps": float(norm.eps),
    }


def _processor(vlm: ClipVLM) -> dict[str, Any]:
    framing = vlm.framing
    side = {"height": framing.image_size, "width": framing.image_size}
    cut = framing.resize_mode == "shortest"
    resized = {"shortest_edge": framing.scaled} if cut else side
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": resized,
        "resample": _FILTERS[framing.interpolation],
        "do_center_crop": cut,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(v) for v in vlm.mean.double().flatten()],
        "image_std": [float(v) for v in vlm.std.double().flatten()],
    }


def _tokenizer_files(vlm: ClipVLM) -> dict[str, str]:
    tokenizer: Any = vlm.tokenizer
    vocab = dict(tokenizer.encoder)
    start, end = sorted(vocab, key=vocab.__getitem__)[-2:]
    vocab[_START], vocab[_END] = vocab.pop(start), vocab.pop(end)
    ranks = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    names = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": len(vlm.model.positional_embedding),
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
        **names,
    }
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, ranks)]) + "\n",
        "tokenizer_config.json": _json(settings),
        "special_tokens_map.json": _json(names),
    }


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# The comparison


@torch.no_grad()
def _require_same(
    vlm: ClipVLM, module: Any, config: dict[str, Any], state: Mapping[str, torch.Tensor], texts: Mapping[str, str]
) -> None:
    """Refuse a model that transformers computes otherwise: a setting that was not thought of would show here."""
    wrong = f"'{vlm.spec}' cannot be written for transformers"
    with quiet(), same_random_state():
        model = module.CLIPModel(module.CLIPConfig.from_dict(dict(config))).eval()
    own = model.state_dict()
    odd = sorted(
        (state.keys() ^ own.keys())
        | {name for name in state.keys() & own.keys() if state[name].shape != own[name].shape}
    )
    if odd:
        raise UserError(f"{wrong}: '{odd[0]}' has no counterpart in CLIPModel; {_OTHER}")
    model.load_state_dict({name: value.float().cpu() for name, value in state.items()})
    ids, given = _ids(vlm, module, texts)
    for ours, theirs, text in zip(ids, given["input_ids"], PROBES, strict=True):
        end = int(ours.argmax()) + 1
        if not torch.equal(ours[:end], theirs[:end].to(ours)):
            raise UserError(f"{wrong}: CLIPTokenizer reads {text[:40]!r} otherwise; {_OTHER}")
    pixels = trial_pixels(2, vlm.image_size)
    values = (pixels - vlm.mean.cpu()) / vlm.std.cpu()
    images = pooled(model.get_image_features(pixel_values=values), "the image tower")
    features = pooled(model.get_text_features(**given), "the text tower")
    pairs = (
        (images, vlm.embed_image(pixels.to(vlm.device))),
        (features, vlm.embed_text(list(PROBES))),
    )
    for theirs, ours in pairs:
        if (theirs - ours.cpu()).abs().max() > ROUNDING * ours.abs().max().cpu().clamp_min(1):
            raise UserError(f"{wrong}: CLIPModel gives other features with its weights; {_OTHER}")


def _ids(vlm: ClipVLM, module: Any, texts: Mapping[str, str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the probes' token ids of both, and with transformers' the mask."""
    with tempfile.TemporaryDirectory() as place:
        for name, text in texts.items():
            (Path(place) / name).write_text(text, encoding="utf-8")
        with quiet():
            tokenizer = module.CLIPTokenizer.from_pretrained(place, local_files_only=True)
    given = tokenizer(list(PROBES), padding="max_length", truncation=True, return_tensors="pt")
    return vlm.tokenizer(list(PROBES)), {name: given[name] for name in ("input_ids", "attention_mask")}

"""The layouts in which CLIP's weights are published, brought to the names of an open_clip model."""

import contextlib
import re
from collections.abc import Mapping

import torch
from torch import nn


def from_open_clip(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights after open_clip's own conversions for `model`: older layouts, other image and context sizes."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    found: dict[str, torch.Tensor] = convert_state_dict(model, dict(weights))
    own = model.state_dict()
    if "positional_embedding" in found and "positional_embedding" not in own:
        found = convert_to_custom_text_state_dict(found)
    found.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        if name in found and name in own and found[name].numel() == 1:
            found[name] = found[name].reshape(own[name].shape)
    if hasattr(model, "visual"):
        # Where these fail, the checkpoint is of another width; the comparison of shapes says so in words.
        with contextlib.suppress(AssertionError, AttributeError, RuntimeError):
            resize_pos_embed(found, model)
            resize_text_pos_embed(found, model)
    return found


# CLIP as transformers names it: each row of a pattern and what open_clip calls the same tensor

_LAYER = (
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)
_BESIDE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in (
        ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"),
    ) for kind in ("weight", "bias")},
}  # fmt: skip
_PLACE = re.compile(
    r"(?P<before>(?:.+?\.)??)(?:(?P<tower>vision|text)_model\.)?"
    r"(?P<rest>embeddings\..*|encoder\.layers\..*|(?:pre_layrnorm|post_layernorm|final_layer_norm)\..*)"
)
_PROJECTION = re.compile(r"(?P<before>(?:.*\.)?)(?P<tower>visual|text)_projection\.weight")
_QKV = re.compile(r"(?P<stem>.*)self_attn\.(?P<which>[qkv])_proj\.(?P<kind>weight|bias)")


def from_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return the weights of a CLIP of transformers, or of one of its towers, under open_clip's names; None for others.

    Queries, keys and values become one tensor, projections are transposed; what stands before a name stays there.

    Example:
        >>> found = from_transformers({"text_model.embeddings.token_embedding.weight": torch.ones(9, 4),
        ...                            "text_projection.weight": torch.ones(2, 4)})
        >>> {name: list(tensor.shape) for name, tensor in found.items()}
        {'token_embedding.weight': [9, 4], 'text_projection': [4, 2]}
    """
    bare = _tower_of(weights)
    if bare is None:
        return None
    found: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        if (match := _PROJECTION.fullmatch(key)) is not None:
            name = "visual.proj" if match["tower"] == "visual" else "text_projection"
            found[match["before"] + name] = tensor.T if tensor.ndim == 2 else tensor
        elif (match := _PLACE.fullmatch(key)) is not None:
            tower = "visual." if (match["tower"] or bare) == "vision" else ""
            name = match["before"] + tower + _renamed(match["rest"])
            if (part := _QKV.fullmatch(name)) is not None:
                apart.setdefault(f"{part['stem']}attn.in_proj_{part['kind']}", {})[part["which"]] = tensor
            else:
                found[name] = tensor
        else:
            found[key] = tensor
    for name, parts in apart.items():
        if parts.keys() == set("qkv"):  # else the name stays missing, and is said to be
            found[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return found


def _tower_of(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Return which tower keys without "vision_model" or "text_model" belong to; None for no layout of transformers."""
    if any(key.endswith("embeddings.patch_embedding.weight") for key in weights):
        return "vision"
    return "text" if any(key.endswith("embeddings.token_embedding.weight") for key in weights) else None


def _renamed(rest: str) -> str:
    if rest in _BESIDE:
        return _BESIDE[rest]
    rest = re.sub(r"^encoder\.layers\.", "transformer.resblocks.", rest)
    for theirs, ours in _LAYER:
        rest = re.sub(rf"(?<=\d\.){theirs}\.", f"{ours}.", rest)
    return rest

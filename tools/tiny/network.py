"""The tiny CLIP: its configuration in open_clip's terms, its files, and its zero-shot head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustvlm.data.emoji import ASSETS, TEMPLATES

FOLDER = ASSETS / "tiny"
BPE = FOLDER / "bpe_4096.txt.gz"
WEIGHTS = "open_clip_model.safetensors"
MODEL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "layers": [2, 2, 2, 2], "width": 24, "head_width": 48},
    "text_cfg": {"context_length": 24, "vocab_size": 4096, "width": 128, "heads": 4, "layers": 2},
}
PREPROCESS: dict[str, Any] = {
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def build() -> CLIP:
    """Return the network with fresh weights."""
    return CLIP(**json.loads(json.dumps(MODEL)))  # a deep copy: open_clip changes the dictionaries it is given


def tokenizer() -> open_clip.SimpleTokenizer:
    """Return the tokenizer over the small vocabulary."""
    return open_clip.SimpleTokenizer(bpe_path=str(BPE), context_length=MODEL["text_cfg"]["context_length"])


def load(folder: Path = FOLDER) -> CLIP:
    """Return the trained network in eval mode, float32."""
    model = build()
    # The mask of the text tower is a buffer the network makes itself, hence not strict; copying widens fp16 to fp32.
    model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    return model.eval()


def save(model: CLIP, folder: Path = FOLDER) -> None:
    """Write the folder that open_clip reads as `local-dir:`, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous().clone()
        for key, value in model.state_dict().items()
        if key != "attn_mask"
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600, which would survive into the wheel


@torch.no_grad()
def class_embeddings(model: CLIP, names: Sequence[str]) -> Tensor:
    """Return unit embeddings [K, D]: the mean over the prompt ensemble of each name."""
    tokens = tokenizer()([template.format(name) for name in names for template in TEMPLATES])
    features = F.normalize(model.encode_text(tokens).float(), dim=-1)
    return F.normalize(features.view(len(names), len(TEMPLATES), -1).mean(1), dim=-1)


@torch.no_grad()
def image_features(model: CLIP, pixels: Tensor, *, batch: int = 128) -> Tensor:
    """Return unit features [N, D] of pictures in [0, 1]."""
    return F.normalize(torch.cat([model.encode_image(part).float() for part in pixels.split(batch)]), dim=-1)

"""Small real open_clip models with random weights, and a cache folder of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustvlm.models.class_cache import forget_embeddings

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

VIT = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    forget_embeddings()


@pytest.fixture
def save_clip(tmp_path: Path) -> Callable[..., Path]:
    """Write a model folder with random weights; keyword arguments override the config's preprocess part."""
    import open_clip

    def save(name: str = "model", *, model_cfg: dict[str, Any] | None = None, seed: int = 0, **preprocess: Any) -> Path:
        from safetensors.torch import save_file

        folder = tmp_path / name
        folder.mkdir(parents=True)
        settings = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": model_cfg or VIT, "preprocess_cfg": {**settings, **preprocess}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder

    return save

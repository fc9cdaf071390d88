"""A small open_clip model in a folder, a small encoder of one's own, coloured pictures, and runs on them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from robustvlm.commands.finetune import FINETUNE, FinetuneSettings
from robustvlm.core.seeds import generator
from robustvlm.data.emoji import ASSETS
from robustvlm.runs.run import Run

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 4096, "width": 16, "heads": 1, "layers": 1},
        "quick_gelu": True,
    },
    "preprocess_cfg": {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.3, 0.3, 0.2],
        "interpolation": "bilinear",
        "resize_mode": "shortest",
    },
}


def clip_folder(folder: Path, *, seed: int = 0, width: int = 32) -> Path:
    """Write a small vision transformer with random weights as open_clip reads it."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["vision_cfg"]["width"] = width
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(ASSETS / "tiny" / "bpe_4096.txt.gz", folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def pictures(folder: Path, *, each: int = 12) -> str:
    """Write noisy pictures of three colours and return their spec."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = 60 * torch.rand(16, 16, 3, generator=generator(name, i)) - 30
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")
    return f"imagefolder:{folder}"


class Own(nn.Module):
    """An encoder of one's own."""

    image_size, logit_scale = 8, 20.0

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Tanh(), nn.Linear(width, 4))
        self.table = nn.Embedding(64, 4)
        for i, p in enumerate(self.parameters()):
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / p.shape[-1] ** 0.5

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels - 0.5)

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.table(torch.tensor([sum(map(ord, text)) % 64 for text in texts]))


def wide() -> Own:
    return Own(width=13)


OWN = "small:Own"
sys.path.insert(0, str(Path(__file__).parent))


def prepared(out: Path, **settings: Any) -> Run:
    """Return a short run on the pictures beside `out`."""
    data = out / "pictures"
    spec = f"imagefolder:{data}" if data.exists() else pictures(data)
    defaults = {"model": OWN, "data": spec, "method": "tecoa", "eps": "8/255"}
    defaults |= {} if settings.get("method") == "clean" else {"inner_steps": 2}
    defaults |= {"steps": 12, "batch_size": 8, "lr": 0.01, "val_steps": 3, "validate_every": 4, "device": "cpu"}
    defaults |= {"out": out, "name": "run", "checkpoint_every": 5}
    command = settings.pop("command", "robustvlm finetune")
    return Run(FINETUNE, FinetuneSettings(**(defaults | settings)), given=command)

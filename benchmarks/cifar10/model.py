"""The model: a 32-pixel convolutional image tower beside open_clip's text tower, and its run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustvlm.errors import UserError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the CIFAR-10 training pixels
RUN_VARIABLE, DEFAULT_RUN = "ROBUSTVLM_CIFAR10", Path("runs/cifar10")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of both towers; written as config.json beside the weights."""

    stem: int = 24
    widths: tuple[int, ...] = (64, 128, 256)
    embed_dim: int = 128
    image_size: int = 32
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 2
    context_length: int = 20


class Block(nn.Module):
    """Halve the resolution and change the width, then refine on a residual branch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(outputs)
        self.refine = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.refine_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.down_norm(nn.functional.max_pool2d(self.down(x), 2)))
        return x + nn.functional.gelu(self.refine_norm(self.refine(x)))


class ImageTower(nn.Module):
    """Pixels in [0, 1], [B, 3, 32, 32], to features [B, embed_dim]."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        # 2x2 without padding: 31 pixels a side, then 15, 7 and 3; an eighth cheaper than 32, 16, 8, 4.
        self.stem = nn.Conv2d(3, config.stem, 2)
        channels = (config.stem, *config.widths)
        self.blocks = nn.Sequential(*(Block(i, o) for i, o in pairwise(channels)))
        self.head = nn.Linear(channels[-1], config.embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks(nn.functional.gelu(self.stem((pixels - self.mean) / self.std)))
        return self.head(x.amax(dim=(2, 3)))


@cache
def _tokenizer(context_length: int) -> SimpleTokenizer:
    return SimpleTokenizer(context_length=context_length)


class CifarCLIP(nn.Module):
    """Both towers and the temperature: the object that `load` returns.

    `encode_image` takes pixels in [0, 1], [B, 3, H, W], and `encode_text` a list of N strings; they return
    features [B, D] and [N, D] that are not normalised. `image_size` is 32, `logit_scale` the temperature's inverse.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.tokenizer = _tokenizer(config.context_length)
        self.visual = ImageTower(config)
        self.text = TextTransformer(
            context_length=config.context_length,
            vocab_size=self.tokenizer.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            output_dim=config.embed_dim,
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def logit_scale(self) -> float:
        return float(self.log_scale.detach().exp())

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.visual(pixels)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        tokens: Tensor = self.tokenizer(list(texts)).to(self.log_scale.device)
        return self.text(tokens)

    def logits(self, pixels: Tensor, class_embeddings: Tensor) -> Tensor:
        """Scaled cosine similarities [B, K] to unit class embeddings [K, D]."""
        features = nn.functional.normalize(self.encode_image(pixels).float(), dim=-1)
        return self.log_scale.exp() * features @ class_embeddings.T


def save(model: CifarCLIP, folder: Path) -> None:
    """Write config.json and model.safetensors into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial)
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    partial.replace(folder / "model.safetensors")


def load(folder: Path | None = None) -> CifarCLIP:
    """Read a run folder (default: $ROBUSTVLM_CIFAR10, else runs/cifar10) into a frozen model in eval mode.

    Raises UserError when the folder holds no trained model or the weights do not fit config.json.
    """
    folder = folder or Path(os.environ.get(RUN_VARIABLE) or DEFAULT_RUN)
    try:
        fields = json.loads((folder / "config.json").read_text())
        model = CifarCLIP(ModelConfig(**{**fields, "widths": tuple(fields["widths"])}))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except FileNotFoundError as error:
        raise UserError(
            f"expected a trained CIFAR-10 model in '{folder}', found no {Path(str(error.filename)).name or 'files'}: "
            f"train one with python -m benchmarks.cifar10.train, or point {RUN_VARIABLE} to its folder"
        ) from error
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"'{folder}' is no readable CIFAR-10 run ({reason}): train it again") from error
    return model.eval().requires_grad_(False)

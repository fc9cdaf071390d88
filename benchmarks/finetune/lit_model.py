"""A model of the LiT kind: an image tower trained onto a locked text tower, here the sentence encoder MiniLM."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.cifar10.model import ImageTower, ModelConfig
from robustvlm.errors import UserError
from robustvlm.models.sentences import WIDTH, SentenceEncoder, sentence_encoder

RUN_VARIABLE, DEFAULT_RUN = "ROBUSTVLM_LIT", Path("runs/lit-emoji")


def emoji_tower() -> nn.Module:
    """Return the image tower of the bundled model with an output as wide as MiniLM's, its weights fresh."""
    return ModifiedResNet([2, 2, 2, 2], output_dim=WIDTH, heads=16, image_size=64, width=24)


def cifar_tower() -> nn.Module:
    """Return the image tower of the CIFAR-10 model with an output as wide as MiniLM's, its weights fresh."""
    return ImageTower(ModelConfig(embed_dim=WIDTH))


TOWERS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {"emoji": (emoji_tower, 64), "cifar10": (cifar_tower, 32)}
"""Image towers by the set that they are trained on, and the size of their images."""


@cache
def _kept(texts: tuple[str, ...]) -> Tensor:
    return sentence_encoder()(texts)


class LitCLIP(nn.Module):
    """Both towers and the temperature: the object that `load` returns.

    The text tower is MiniLM as its authors left it, followed by a projection [384, 384] that is the identity: a linear
    map for methods that train one, which changes nothing before they do.

    Source: Zhai et al. 2022 (LiT, arXiv 2111.07991), with the text tower locked in place of the image tower.
    """

    def __init__(self, kind: str, scale: float = 20.0) -> None:
        super().__init__()
        make, self.image_size = TOWERS[kind]
        self.kind = kind
        self.visual = make()
        self.words = SentenceEncoder().requires_grad_(False)
        self.text_projection = nn.Parameter(torch.eye(WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    @property
    def logit_scale(self) -> float:
        """The inverse of the temperature."""
        return float(self.log_scale.detach().exp())

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return features [B, 384] of pixels [B, 3, S, S] in [0, 1]."""
        features: Tensor = self.visual(pixels)
        return features

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return features [N, 384]; without the projection where it is taken out."""
        # The tower is locked, so texts are encoded once; unless a gradient is wanted, or a prompt stands in for tokens.
        asked = torch.is_grad_enabled() or self.words.tokens._forward_hooks
        features: Tensor = self.words(texts) if asked else _kept(tuple(texts)).clone()
        return features if self.text_projection is None else features @ self.text_projection


def folded(module: nn.Module) -> nn.Module:
    """Fold the batch normalisations of a ModifiedResNet in evaluation mode into its convolutions, in place.

    It computes the same and takes a third less time. Other towers have none that directly follow a convolution.
    """
    for part in list(module.modules()):
        names = dict(part.named_children())
        pairs = [("0", "1")] if "-1" in names else [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
        for first, second in pairs:
            conv, norm = names.get(first), names.get(second)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, first, fuse_conv_bn_eval(conv, norm))
                setattr(part, second, nn.Identity())
    return module


def save(model: LitCLIP, folder: Path, record: Mapping[str, Any]) -> None:
    """Write config.json and the weights of the image tower, folded, and of the temperature."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"kind": model.kind, **record}, indent=2) + "\n", encoding="utf-8")
    weights = {f"visual.{name}": value.contiguous() for name, value in folded(model.visual.eval()).state_dict().items()}
    save_file({"log_scale": model.log_scale.detach(), **weights}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read


def load(folder: Path | None = None) -> LitCLIP:
    """Read a folder (default: $ROBUSTVLM_LIT, else runs/lit-emoji) into a frozen model in evaluation mode.

    Raises:
        UserError: no trained model is there, or MiniLM's packages are not installed.
    """
    folder = folder or Path(os.environ.get(RUN_VARIABLE) or DEFAULT_RUN)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["kind"]
        weights = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise UserError(
            f"expected a trained LiT model in '{folder}', found no {Path(str(error.filename)).name or 'files'}: train "
            f"one with python -m benchmarks.finetune.lit, or point {RUN_VARIABLE} to its folder"
        ) from error
    model = LitCLIP(kind).eval()
    folded(model.visual)
    missing, unknown = model.load_state_dict(weights, strict=False)  # MiniLM and the projection are as they are made
    if gone := [name for name in missing if not name.startswith(("words.", "text_projection"))] + unknown:
        raise UserError(
            f"the weights in '{folder}' are not those of a '{kind}' tower (first: {gone[0]}): train it again"
        )
    return model.requires_grad_(False)

"""Small encoders and trees for the tests of fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.data.trees import Forest, Tree
from robustvlm.defenses.finetune import FinetuneSettings, FinetuneTask, InnerAttack, finetune_task
from robustvlm.models import VLM

NAMES = ("cat", "dog", "elk", "car")


class Block(nn.Module):
    """A residual layer, as towers have several of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


class SmallVLM(VLM):
    """A convolution with batch normalisation, residual blocks and a projection; texts by a table and a projection."""

    def __init__(self, *, width: int = 12, dimensions: int = 6) -> None:
        super().__init__(spec="small", image_size=8, logit_scale=10.0)
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.proj = nn.Parameter(torch.empty(width, dimensions))
        self.table = nn.Embedding(64, 5)
        self.text_projection: nn.Parameter | None = nn.Parameter(torch.empty(5, dimensions))

    def _image_features(self, pixels: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(pixels))).mean((2, 3))
        return self.blocks(x) @ self.proj

    def _text_features(self, texts: list[str]) -> Tensor:
        rows = self.table(torch.tensor([sum(map(ord, text)) % 64 for text in texts]))
        return rows if self.text_projection is None else rows @ self.text_projection


def small_vlm(seed: int = 0, dimensions: int = 6) -> SmallVLM:
    """Return an encoder whose weights, statistics of batch normalisation included, follow from the seed."""
    draws, vlm = torch.Generator().manual_seed(seed), SmallVLM(dimensions=dimensions)
    with torch.no_grad():
        for tensor in vlm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draws) * 1.6 - 0.8)
        vlm.stem_norm.running_var.abs_().add_(0.5)
    return vlm.eval()


def small_forest() -> Forest:
    """Return two trees over NAMES; in the first, elk and car are less deep than the pets."""
    kind = Tree.from_chains(
        [("cat", "pet", "animal", "all"), ("dog", "pet", "animal", "all"), ("elk", "animal", "all"), ("car", "all")]
    )
    place = Tree(
        (("cat", "home", "place"), ("dog", "home", "place"), ("elk", "wood", "place"), ("car", "home", "place"))
    )
    return Forest((kind, place))


def images(count: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return pixels and labels."""
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=draws), torch.arange(count) % len(NAMES)


def make_task(vlm: VLM, method: str, forest: Forest | None = None, **settings: object) -> FinetuneTask:
    """Return the task of a method on the four classes."""
    settings.setdefault("attack", InnerAttack(threat=ThreatModel("Linf", 0.05), steps=2))
    return finetune_task(
        vlm,
        FinetuneSettings(method=method, **settings),  # type: ignore[arg-type]
        class_names=NAMES,
        templates=("{}", "a {}"),
        calibration=images(5, seed=2)[0],
        forest=forest,
        in_place=True,
    )

"""Small models and images with known properties, shared by the attack tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustvlm.attacks import Job, LaneAttack, LaneEngine, Misclassify, Oracle, Result, ThreatModel

SIDE, CHANNELS = 6, 3
PIXELS = CHANNELS * SIDE * SIDE


class Linear(nn.Module):
    """Logits = W x + b: attacks on it have closed forms."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(PIXELS, classes)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(classes, PIXELS, generator=draws) * 0.3)
            self.layer.bias.copy_(torch.randn(classes, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class Curved(nn.Module):
    """A small network with curved decision boundaries."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(PIXELS, 24, generator=draws) / PIXELS**0.5 * 4)
        self.second = nn.Parameter(torch.randn(24, classes, generator=draws) / 24**0.5 * 6)

    def forward(self, x: Tensor) -> Tensor:
        return _rowwise(torch.tanh(_rowwise(x.flatten(1) - 0.5, self.first)), self.second)


def _rowwise(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows [B, I] times weight [I, O], each row added up alone: kernels of small products may see its place."""
    return (rows[:, :, None] * weight).sum(1)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def right_jobs(model: nn.Module, count: int = 24, seed: int = 1) -> list[Job]:
    """Jobs whose label is what the model says of the clean image."""
    x = images(count, seed)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1).tolist()
    return [
        Job(f"image-{i}", i, x[i], labels[i], tuple(Misclassify().targets(logits[i], labels[i], 9)))
        for i in range(count)
    ]


def attack_all(
    model: nn.Module,
    attack: LaneAttack,
    threat: ThreatModel,
    jobs: list[Job],
    *,
    lanes: int = 8,
    seed: int = 0,
    precision: str = "fp32",
    rungs: tuple[int, ...] = (),
) -> list[Result]:
    """Run the attack on all jobs and return the results in order of the images."""
    engine = LaneEngine(Oracle(model, precision=precision), attack, threat, lanes=lanes, seed=seed, rungs=rungs)
    return sorted(engine.run(jobs), key=lambda result: result.job.index)


def fooled(results: list[Result]) -> set[int]:
    return {result.job.index for result in results if result.outcome == "fooled"}

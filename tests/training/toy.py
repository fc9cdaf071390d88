"""A tiny task on made-up images, also run as a program: FOLDER OUT KILL_AT [key=number...]."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from robustvlm.core.ranks import current_ranks
from robustvlm.core.seeds import generator
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.stats import rate
from robustvlm.training import Draws, Measure, Task, Trainer, TrainingConfig, TrainingImages, TrainingObserver, gathered
from robustvlm.training.history import History
from robustvlm.training.images import AUGMENTATIONS
from robustvlm.training.state import LAST, read_checkpoint

SIDE = 8


class Squares(DataSource):
    """Noise, brighter on the side that the label names; some images may be unreadable or of no class."""

    def __init__(
        self, count: int, *, broken: frozenset[int] = frozenset(), unknown: frozenset[int] = frozenset()
    ) -> None:
        super().__init__("squares", ["left", "right"])
        self.count, self.broken, self.unknown = count, broken, unknown

    def ids(self) -> list[str]:
        return [f"square-{i}" for i in range(self.count)]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for i, name in enumerate(self.ids()):
            if keep(name):
                yield Unreadable(name, "damaged") if i in self.broken else self._sample(i, name)

    def _sample(self, i: int, name: str) -> Sample:
        pixels = 0.6 * torch.rand(SIDE, SIDE, 3, generator=generator("squares", i))
        half = slice(0, SIDE // 2) if i % 2 == 0 else slice(SIDE // 2, SIDE)
        pixels[:, half] += 0.4
        image = Image.fromarray((255 * pixels).to(torch.uint8).numpy())
        return Sample(name, image, -1 if i in self.unknown else i % 2)


class Toy(Task):
    """A small network with batch normalisation and dropout, a noisy loss, and a term over the whole batch."""

    best_by = "accuracy"

    def __init__(self, *, seed: int = 0, dropout: float = 0.0, together: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            normed = nn.Sequential(nn.Linear(3 * SIDE**2, 16), nn.BatchNorm1d(16), nn.ReLU())
            super().__init__(nn.Sequential(nn.Flatten(), normed, nn.Dropout(dropout), nn.Linear(16, 2)))
        self.dropout, self.together = dropout, together
        self.check = TrainingImages(Squares(40), size=SIDE, seed=99, how=AUGMENTATIONS["none"])

    def train_mode(self) -> None:
        self.module.train(self.dropout > 0)

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        del step
        outputs = self.module(pixels + 0.1 * draws.normal(pixels) + 0.1 * draws.uniform(pixels, "more"))
        loss = F.cross_entropy(outputs, labels)
        if self.together:  # no mean over images: it needs them all
            loss = loss + 0.1 * gathered(outputs).std(dim=0).log().square().sum()
        return {"loss": loss, "error": (outputs.argmax(1) != labels).float().mean()}

    def validate(self) -> dict[str, Measure]:
        batch = next(iter(self.check.batches([range(40)])))
        with torch.no_grad():
            return {"accuracy": rate(int((self.module(batch.pixels).argmax(1) == batch.labels).sum()), 40)}


class Killer(TrainingObserver):
    """Kills its own process without warning when a step is reached."""

    def __init__(self, at: int) -> None:
        self.at = at

    def stepped(self, step: int, terms: object) -> None:
        del terms
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def images(**options: object) -> TrainingImages:
    settings = {"size": SIDE, "seed": 5, "how": AUGMENTATIONS["strong"]} | options
    return TrainingImages(settings.pop("source", Squares(50)), **settings)  # type: ignore[arg-type]


def config(**options: object) -> TrainingConfig:
    settings: dict[str, object] = {"steps": 24, "batch_size": 12, "lr": 0.01, "warmup": 3, "ema": 0.9, "seed": 5}
    return TrainingConfig(**(settings | {"validate_every": 6, "checkpoint_every": 5} | options))  # type: ignore[arg-type]


def fit(
    folder: Path, *, task: Toy | None = None, observer: TrainingObserver | None = None, **options: object
) -> tuple[Toy, History]:
    task = task or Toy()
    history = Trainer(task, images(), config(**options), ranks=current_ranks(), observer=observer).fit(folder)
    return task, history


def killed(folder: Path, task: Toy, at: int, **options: object) -> None:
    """Train in a child process that is killed at a step; fail if it was not."""
    child = os.fork()  # before torch has started any thread
    if child == 0:
        fit(folder, task=task, observer=Killer(at), **options)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child came to its end"
    assert os.WTERMSIG(status) == signal.SIGKILL


def main() -> None:
    folder, out, kill_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    options: dict[str, object] = {key: int(value) for key, value in (text.split("=") for text in sys.argv[4:])}
    task = Toy(dropout=0.3 * bool(options.pop("dropout", 0)), together=bool(options.pop("together", 0)))
    if kill_at:
        killed(folder, task, kill_at, **options)
        assert read_checkpoint(folder / LAST)[1]["step"] < kill_at
    fit(folder, task=task, **options)
    if current_ranks().leader:
        save_file(dict(task.module.state_dict()), out)


if __name__ == "__main__":
    main()

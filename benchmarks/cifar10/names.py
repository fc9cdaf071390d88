"""Teach the CIFAR-10 CLIP the names of superclasses too, as a CLIP trained on captions knows them.

    python -m benchmarks.cifar10.names --train TRAIN.parquet --start runs/cifar10 --out runs/cifar10_names

The image tower and the temperature are held; the text tower is tuned so that an image matches the name of its class
among the classes and the names of its superclasses, each among those of its level. A minute on one core.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.common import exit_code_of
from robustvlm.data import open_data

from .data import read_images
from .model import CifarCLIP, load, save
from .prompts import random_prompts


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training Parquet file")
    parser.add_argument("--start", type=Path, default=Path("runs/cifar10"), help="run folder to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_names"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    return exit_code_of(lambda: save(named(load(options.start), options), options.out))


def named(model: CifarCLIP, options: argparse.Namespace) -> CifarCLIP:
    """Tune the text tower in place and return the model."""
    source = open_data(f"parquet:{options.train}")
    assert source.tree is not None
    tree = source.tree[0]
    features, labels = _features(model, options)
    levels = [(tree.level_names(i), torch.tensor(tree.superclass_labels(i))) for i in range(tree.levels - 1)]
    model.text.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.text.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps)
    draw = random.Random(options.seed)
    for step in range(options.steps):
        rows = torch.randint(len(labels), (512,))
        losses = [
            cross_entropy(model.logit_scale * features[rows] @ _texts(model, names, draw).T, groups[labels[rows]])
            for names, groups in levels
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: " + ", ".join(f"{float(loss.detach()):.3f}" for loss in losses), flush=True)
    return model


def _features(model: CifarCLIP, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images = read_images(options.train, cache=options.start)
    pixels, labels = images.pixels[:10_000].permute(0, 3, 1, 2), images.labels[:10_000]
    with torch.inference_mode():
        found = [model.encode_image(part.float() / 255) for part in pixels.split(500)]
    return normalize(torch.cat(found).clone(), dim=-1), labels


def _texts(model: CifarCLIP, names: tuple[str, ...], draw: random.Random) -> Tensor:
    return normalize(model.encode_text(random_prompts(names, draw)), dim=-1)


if __name__ == "__main__":
    sys.exit(main())

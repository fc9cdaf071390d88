"""Prompt tuning with and without the energy terms where the text tower knows words: the context enters MiniLM.

    python -m benchmarks.prompt_tuning_words photowords --photographs PHOTOGRAPHS.parquet
    ROBUSTVLM_LIT=runs/lit-cifar10 python -m benchmarks.prompt_tuning_words cifar10 --train FILE --test FILE
    ROBUSTVLM_LIT=runs/lit-emoji python -m benchmarks.prompt_tuning_words emoji

  photowords  there is one photograph of a class, so what is learnt are families (level 1 of ImageNet's tree): half of
              those with eight photographs or more, drawn by the seed, five of each to learn from and the others to test
              on. Near: families under one node at level 3 with a known one; far: families under a node that has none.
  cifar10     16 images of each of 6 classes drawn by the seed. Near: the other 4; far: the bundled drawings.
  emoji       16 images of each of the 101 classes in six styles; tested on another style. Near, far: those of the set.

The models are those of benchmarks/photowords and of benchmarks.finetune.lit. Images are encoded once, under --cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import exit_code_of
from robustvlm.core.seeds import generator
from robustvlm.data import open_data
from robustvlm.data.trees import Tree
from robustvlm.defenses.prompts import Features
from robustvlm.errors import UserError
from robustvlm.models import load_model

from .prompt_tuning import METHODS, Kept, Setting, cifar, emoji, pick, run

FAMILY, NODE, ENOUGH, SHOTS = 1, 3, 8, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("photowords", "cifar10", "emoji"))
    parser.add_argument("--photographs", type=Path, help="a Parquet file (python -m benchmarks.photowords.photographs)")
    parser.add_argument("--train", type=Path, help="CIFAR-10 training images (Parquet)")
    parser.add_argument("--test", type=Path, help="CIFAR-10 test images (Parquet)")
    parser.add_argument("--cache", type=Path, default=Path("runs/prompt-features"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="default: 50, and 10 on emoji, where an epoch has seven steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    if options.set == "photowords":
        kept = Kept(load_model("benchmarks.photowords.model:load"), options.cache)
        source = open_data(f"parquet:{_given(options.photographs, '--photographs')}")
        if source.tree is None:
            raise UserError(f"{options.photographs}: the classes are not ImageNet's, so there is no tree over them")
        images = kept.features(f"parquet:{options.photographs}")
        settings = [photowords(images, source.tree[0], source.templates, seed) for seed in seeds]
    elif options.set == "cifar10":
        kept = Kept(load_model("benchmarks.finetune.lit_model:load"), options.cache)
        specs = {name: f"parquet:{_given(getattr(options, name), f'--{name}')}" for name in ("train", "test")}
        settings = [_near_and_far(kept, cifar(kept, seed, **specs)) for seed in seeds]
    else:
        kept = Kept(load_model("benchmarks.finetune.lit_model:load"), options.cache)
        styles, test = "emoji?split=train&copies=3", "emoji?split=test&copies=4"
        settings = [emoji(kept, seed, tuned_on=styles, tested_on=test) for seed in seeds]
    run(options.set, kept.vlm, settings, METHODS, options.epochs or (10 if options.set == "emoji" else 50))


def photowords(images: Features, tree: Tree, templates: Sequence[str], seed: int) -> Setting:
    """Return families of photographs to learn and to tell from others, drawn by the seed."""
    family = torch.tensor(tree.superclass_labels(FAMILY))[images.labels]
    names, node = tree.level_names(FAMILY), _nodes(tree)
    large = [i for i in range(len(names)) if int((family == i).sum()) >= ENOUGH]
    order = torch.randperm(len(large), generator=generator(seed, "known families")).tolist()
    known = sorted(large[i] for i in order[: len(large) // 2])
    place = torch.full((len(names),), -1)
    place[torch.tensor(known)] = torch.arange(len(known))
    images = replace(images, labels=place[family])
    shots = torch.zeros(len(family), dtype=torch.bool)
    seen = dict.fromkeys(range(len(known)), 0)
    for row in torch.randperm(len(family), generator=generator(seed, "shots")).tolist():
        label = int(images.labels[row])
        if seen.get(label, SHOTS) < SHOTS:
            seen[label] += 1
            shots[row] = True
    beside = torch.isin(node, node[torch.tensor(known)])[family]
    unknown = images.labels < 0
    return Setting(
        [names[i] for i in known],
        templates,
        pick(images, shots),
        pick(images, ~shots & ~unknown),
        {"near": pick(images, unknown & beside), "far": pick(images, unknown & ~beside)},
    )


def _nodes(tree: Tree) -> torch.Tensor:
    """Return the node at level 3 of each family."""
    names, nodes = tree.level_names(FAMILY), tree.level_names(NODE)
    above = {path[FAMILY]: path[NODE] for path in tree.paths}
    return torch.tensor([nodes.index(above[name]) for name in names])


def _near_and_far(kept: Kept, setting: Setting) -> Setting:
    far = kept.features("emoji?split=test&copies=1")
    return replace(setting, unknown={"near": setting.unknown["other classes"], "far": far})


def _given(path: Path | None, option: str) -> Path:
    if path is None:
        raise UserError(f"expected the images of this set: pass {option} FILE.parquet")
    return path


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""Sets of a model that knows all classes, tuned on one half of them: the other half is what adversarial tuning costs.

The model is that of `benchmarks.finetune.lit`. Of every superclass each second class is tuned on, beginning with the
first, so that both halves have all superclasses that have two classes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.data import open_data
from robustvlm.data.source import DataSource, select
from robustvlm.data.trees import Forest, Tree

from .measure import Images
from .sets import BenchmarkSet, Condition, Restricted, read_images

MODEL = "benchmarks.finetune.lit_model:load"


def halves(tree: Tree) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes that are tuned on and those that are left out."""
    tuned = {name for names in tree.groups(1).values() for name in names[::2]}
    kept = tuple(name for name in tree.class_names if name in tuned)
    return kept, tuple(name for name in tree.class_names if name not in tuned)


def lit_emoji(limit: int) -> BenchmarkSet:
    """The bundled set: 93 of 173 classes in six styles to tune on; both halves are tested in an unseen style."""
    held = read_images(open_data("emoji?split=test&labels=all&copies=4"), 64)
    return _of_halves("lit-emoji", open_data("emoji?split=train&labels=all&copies=2"), held, limit, batch=64)


def lit_cifar10(train: Path, test: Path, limit: int) -> BenchmarkSet:
    """CIFAR-10: a class or two of every superclass to tune on; the others as what is left out."""
    held = read_images(open_data(f"parquet:{test}"), 32)
    return _of_halves("lit-cifar10", open_data(f"parquet:{train}"), held, limit, batch=128)


def _of_halves(name: str, source: DataSource, held: Images, limit: int, *, batch: int) -> BenchmarkSet:
    assert source.tree is not None
    tree, names = source.tree[0], source.class_names
    tuned, rest = halves(tree)
    among = _some(held, names, rest, names, limit)
    above = replace(among, labels=torch.tensor(tree.superclass_labels(1))[among.labels])
    return BenchmarkSet(
        name,
        MODEL,
        Restricted(source, tuned),
        Forest((tree.restrict(tuned),)),
        lr=5e-4,
        batch=batch,
        seen=Condition("tuned half", tuned, _some(held, names, tuned, tuned, limit)),
        transfer=(
            Condition("left-out half alone", rest, _some(held, names, rest, rest, limit), left_out=True),
            Condition("left-out half among all", names, among, left_out=True),
            Condition("left-out half, superclasses by name", tree.level_names(1), above, left_out=True),
        ),
        together=Condition("all classes", names, _some(held, names, names, names, limit)),
        levels=False,
    )


def _some(images: Images, names: tuple[str, ...], of: tuple[str, ...], among: tuple[str, ...], limit: int) -> Images:
    """Return `limit` images of some classes, labelled by their place among others, in an order drawn by their ids."""
    place: Tensor = torch.tensor([among.index(name) if name in set(of) else -1 for name in names])[images.labels]
    row = {name: i for i, name in enumerate(images.ids) if place[i] >= 0}
    chosen = select(list(row), limit)
    rows = [row[name] for name in chosen]
    return Images(images.pixels[rows], place[rows], tuple(chosen))

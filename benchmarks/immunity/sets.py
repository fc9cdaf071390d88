"""The features that both halves of the benchmark are made of: encoded once, kept in a folder, and split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.commands.immunize.images import embedder, held_back, read_features, write_features
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.prompts import Features, encode_source
from robustvlm.models import VLM

STYLE = {"val": "streamline-emojis", "test": "twemoji"}
CIFAR_MODEL = "benchmarks.cifar10.model:load"
EMOJI_SPLITS = 5
CIFAR_SPLITS = 5
CIFAR_KNOWN = 6
FIT_IMAGES = 12_000


@dataclass(frozen=True, eq=False)
class Task:
    """One question: images to learn from, to set thresholds with, and to judge on; unknown images by name."""

    name: str
    vlm: VLM
    source: DataSource
    class_names: tuple[str, ...]
    fit: Features
    held_out: Features
    known: Features
    unknown: dict[str, Features]
    unknown_names: tuple[str, ...]


def place_of(folder: Path, name: str, vlm: VLM, source: DataSource, limit: int | None = None) -> Path:
    """Return the file of features in a folder: its own for every model, all data and any number of images."""
    made_with = json.dumps([vlm.fingerprint, source.fingerprint(), limit])
    return folder / f"{name}-{hashlib.sha256(made_with.encode()).hexdigest()[:12]}.safetensors"


def encoded(vlm: VLM, source: DataSource, folder: Path, name: str, limit: int | None = None) -> Features:
    """Return the features of a source, from the folder if they are there."""
    path = place_of(folder, name, vlm, source, limit)
    if not path.exists():
        write_features(path, encode_source(vlm, source, limit=limit), {})
    return read_features(path, {})


def rows(found: Features, mask: Tensor, labels: Tensor | None = None) -> Features:
    """Return some of the images, with other labels if given (for all of them)."""
    index = mask.nonzero().flatten().tolist()
    kept = (found.labels if labels is None else labels)[mask]
    return Features(
        found.features[mask], kept, tuple(found.ids[i] for i in index), tuple(found.groups[i] for i in index)
    )


def emoji_task(folder: Path, judged: str) -> Task:
    """Return the bundled task: fit on the six training styles, judge on `test` (Twemoji) or `val` (Streamline).

    Unknown images of the judged style: `seen words` (classes that the model was trained on, left out of the label
    set: a model that knows the word), `near` and `far` (things that it never saw, in images or in words). Thresholds
    come from `val`; where that is judged, from a fifth of the drawings that are left out of the fit.
    """
    vlm = load_pipeline("tiny")
    style, copies = STYLE[judged], 4 if judged == "test" else 8
    source = open_data("emoji?split=train&copies=4")
    fit = encoded(vlm, source, folder, "emoji-train")
    if judged == "test":
        held_out = encoded(vlm, open_data("emoji?split=val&copies=8"), folder, "emoji-val")
    else:
        out = torch.tensor([held_back(group, 0.2, 0) for group in fit.groups])
        fit, held_out = rows(fit, ~out), rows(fit, out)
    every = open_data(f"emoji?split={judged}&copies={copies}&labels=all")
    all_of_style = encoded(vlm, every, folder, f"emoji-{judged}-all")
    number = {name: k for k, name in enumerate(source.class_names)}
    labels = torch.tensor([number.get(every.class_names[int(k)], -1) for k in all_of_style.labels])
    unknown = {"seen words": rows(all_of_style, labels < 0, labels)}
    for split in ("near", "far"):
        other = open_data(f"emoji?split={split}&styles={style}&copies={copies}")
        unknown[split] = encoded(vlm, other, folder, f"emoji-{split}-{judged}")
    left_out = tuple(name for name in every.class_names if name not in number)
    known = rows(all_of_style, labels >= 0, labels)
    return Task("emoji", vlm, source, source.class_names, fit, held_out, known, unknown, left_out + near_names())


def emoji_splits(folder: Path) -> Iterator[Task]:
    """Yield five tasks on the bundled data: a fifth of all 173 classes is left out in turn.

    `left out` are the Twemoji images of that fifth: siblings of the known classes, whose words the model has read.
    `near` and `far` are the same images for every task.
    """
    vlm = load_pipeline("tiny")
    source = open_data("emoji?split=train&copies=4&labels=all")
    fit = encoded(vlm, source, folder, "emoji-train-all")
    held_out = encoded(vlm, open_data("emoji?split=val&copies=8&labels=all"), folder, "emoji-val-all")
    judged = encoded(vlm, open_data("emoji?split=test&copies=4&labels=all"), folder, "emoji-test-all")
    strange = {}
    for split in ("near", "far"):
        other = open_data(f"emoji?split={split}&styles={STYLE['test']}&copies=4")
        strange[split] = encoded(vlm, other, folder, f"emoji-{split}-test")
    names = source.class_names
    fold = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)) % EMOJI_SPLITS
    for number in range(EMOJI_SPLITS):
        kept = (fold != number).nonzero().flatten().tolist()
        place = torch.full((len(names),), -1)
        place[kept] = torch.arange(len(kept))
        left_out = tuple(name for k, name in enumerate(names) if k not in set(kept))
        learnt, thresholds, known = (place[part.labels] for part in (fit, held_out, judged))
        yield Task(
            f"emoji/{number}",
            vlm,
            source,
            tuple(names[k] for k in kept),
            rows(fit, learnt >= 0, learnt),
            rows(held_out, thresholds >= 0, thresholds),
            rows(judged, known >= 0, known),
            {"left out": rows(judged, known < 0, known), **strange},
            left_out + near_names(),
        )


def near_names() -> tuple[str, ...]:
    """Return the names of the unknown `near` things of the bundled benchmark, to see which antibodies name them."""
    import pyarrow.parquet as pq

    from robustvlm.data.emoji import SPRITES

    table = pq.read_table(SPRITES, columns=["name"], filters=[("split", "in", ["near", "far"])])
    return tuple(sorted(set(table["name"].to_pylist())))


def cifar_tasks(folder: Path, train: str, test: str) -> Iterator[Task]:
    """Yield five choices of 6 known and 4 unknown classes of CIFAR-10; emoji pictures are far."""
    vlm = load_pipeline(CIFAR_MODEL)
    source, judged = open_data(train), open_data(test)
    fit = encoded(vlm, source, folder, "cifar-train", FIT_IMAGES)
    found = encoded(vlm, judged, folder, "cifar-test")
    far = encoded(vlm, open_data("emoji?split=test&copies=4"), folder, "cifar-emoji")
    far = Features(far.features, torch.full_like(far.labels, -1), far.ids, far.groups)
    out = torch.tensor([held_back(group, 0.2, 0) for group in fit.groups])
    for number in range(CIFAR_SPLITS):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(number))
        kept = order[:CIFAR_KNOWN].sort().values.tolist()
        place = torch.full((10,), -1)
        place[kept] = torch.arange(CIFAR_KNOWN)
        names = tuple(source.class_names[k] for k in kept)
        left_out = tuple(name for name in source.class_names if name not in names)
        learnt, known = place[fit.labels], place[found.labels]
        yield Task(
            f"cifar10/{number} without {', '.join(left_out)}",
            vlm,
            source,
            names,
            rows(fit, (learnt >= 0) & ~out, learnt),
            rows(fit, (learnt >= 0) & out, learnt),
            rows(found, known >= 0, known),
            {"near": rows(found, known < 0, known), "far": far},
            left_out,
        )


def texts_of(task: Task) -> Tensor:
    """Return the class embeddings [K, D] of a task."""
    return embedder(task.vlm, task.source.templates)(task.class_names)


def describe(task: Task) -> str:
    """Return the sizes of a task in one line."""
    sizes = {"fit": task.fit, "held out": task.held_out, "known": task.known, **task.unknown}
    return f"{task.name}: " + json.dumps({name: len(found.ids) for name, found in sizes.items()})

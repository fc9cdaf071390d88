"""KR-NFT, which learns from few images, beside NegLabel, whose texts it moves.

    python -m benchmarks.immunity.negatives

The five splits of `benchmarks.immunity.run splits`. Negatives are the bank's antibodies that name no unknown thing,
for all rows the same. KR-NFT learns from random crops of four images a class of the training styles. Its constants are
chosen on known images alone: a part of the known classes is left out in turn, and its Streamline images stand for
unknown ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import exit_code_of
from robustvlm.commands.detect.cropping import CROPS, SHOTS, by_image, few_of_each, random_crops, require_all
from robustvlm.commands.detect.encoding import Answers, ChunkEncoder, Encoded, joined
from robustvlm.commands.immunize.images import read_features, write_features
from robustvlm.core.seeds import generator
from robustvlm.data import open_data
from robustvlm.defenses import load_classifier, load_pipeline
from robustvlm.defenses.prompts import Features
from robustvlm.detect import GDA, MCM, Detector, Energy, Head, MaxLogit, NegLabel
from robustvlm.detect.krnft import KRNFT
from robustvlm.detect.metrics import auroc
from robustvlm.detect.words import mine_negatives
from robustvlm.runs.settings import Observer

from .run import Row, paired, row, table
from .sets import Task, emoji_splits, encoded, place_of, texts_of
from .variants import MISS, Scored, Variant, antibodies_of

TRAIN = "emoji?split=train&copies=4&labels=all"
FOLDS = 3
GRID: Mapping[str, tuple[Any, ...]] = {"lr": (1e-4, 1e-3), "negative_weight": (0.0, 0.03, 0.3)}


@dataclass(frozen=True, eq=False)
class Crops:
    """Crops [N, C, D] of images with the place of each image's class in the list of all 173 [N]."""

    features: Tensor
    labels: Tensor

    def among(self, names: tuple[str, ...], every: tuple[str, ...]) -> Crops:
        """Return those of some classes, labelled by their place among these."""
        place = {name: k for k, name in enumerate(names)}
        labels = torch.tensor([place.get(every[k], -1) for k in self.labels.tolist()])
        return Crops(self.features[labels >= 0], labels[labels >= 0])


def cropped(folder: Path, seed: int) -> Crops:
    """Return the crops of four training images of each of all classes, encoded once."""
    vlm, source = load_pipeline("tiny"), open_data(TRAIN)
    path = place_of(folder, f"emoji-train-crops-{SHOTS}-{CROPS}-{seed}", vlm, source)
    if not path.exists():
        found = encoded(vlm, source, folder, "emoji-train-all")
        shots = few_of_each(Encoded(list(found.ids), found.labels, None, None), seed=seed)
        classifier = load_classifier("tiny", source.class_names, source.templates)
        encoder = ChunkEncoder(Answers(classifier, batch_size=64), seed=seed, observer=Observer())
        made = joined(list(encoder.chunks(source, only=shots, views=random_crops(seed))))
        made = require_all(made, shots, source.spec)
        assert made.features is not None
        write_features(path, Features(made.features, made.labels, tuple(made.ids), tuple(made.ids)), {})
    kept = read_features(path, {})
    return Crops(*by_image(Encoded(list(kept.ids), kept.labels, kept.features, None)))


def negatives_of(task: Task, text: Tensor, *, mined: bool) -> Tensor:
    """Return the bank's antibodies that name no unknown thing; `mined`, the farthest, as NegLabel takes them."""
    found = antibodies_of(task, Variant("words", antibodies="unnamed"), text[:, None], text).embeddings
    return found[mine_negatives(found, text)] if mined else found


def chosen(start: KRNFT, crops: Crops, held: Features, *, seed: int) -> KRNFT:
    """Return the settings of the grid by which classes that are left out in turn are told best from the others.

    With no setting above NegLabel's own AUROC by more than its standard error, no epoch is made.
    """
    head = start.texts.head
    fold = torch.randperm(len(head.class_embeddings), generator=generator(seed, "classes left out")) % FOLDS
    names = tuple(map(str, range(len(fold))))
    gains: dict[tuple[Any, ...], list[float]] = {}
    for number in range(FOLDS):
        kept = (fold != number).nonzero().flatten()
        texts = replace(start.texts, head=Head(head.class_embeddings[kept], head.logit_scale))
        taught = crops.among(tuple(names[k] for k in kept.tolist()), names)
        strange = (fold[held.labels] == number).numpy()

        def area(score: Detector, strange: Any = strange) -> float:
            values = score.predict(held.features).double().numpy()
            return auroc(values[~strange], values[strange])

        base = area(texts)
        for values in itertools.product(*GRID.values()):
            one = replace(start, texts=texts, **dict(zip(GRID, values, strict=True)))
            gains.setdefault(values, []).append(area(one.fit_crops(taught.features, taught.labels)) - base)
    best = max(gains, key=lambda values: float(np.mean(gains[values])))
    for values, found in gains.items():
        print("   ", dict(zip(GRID, values, strict=True)), f"{np.mean(found):+.4f}", flush=True)
    error = float(np.std(gains[best], ddof=1)) / FOLDS**0.5
    if np.mean(gains[best]) <= error:
        return replace(start, epochs=0)
    return replace(start, **dict(zip(GRID, best, strict=True)))


def scores_of(task: Task, crops: Crops, every: tuple[str, ...], seed: int) -> dict[str, tuple[Detector, str]]:
    """Return every score of the table with a word on it."""
    text = texts_of(task)
    head, taught = Head(text, task.vlm.logit_scale), crops.among(task.class_names, every)
    mined = NegLabel(head, negatives_of(task, text, mined=True))
    whole = NegLabel(head, negatives_of(task, text, mined=False))
    found: dict[str, tuple[Detector, str]] = {
        "mcm": (MCM(head), ""),
        "max-logit": (MaxLogit(head), ""),
        "energy": (Energy(head), ""),
        "gda": (GDA(head).fit(task.fit.features, task.fit.labels), ""),
        "neglabel": (mined, f"{len(mined.negatives)} negatives"),
        "neglabel, all antibodies": (whole, f"{len(whole.negatives)} negatives"),
    }
    start = KRNFT(mined, lr=1e-3, seed=seed)
    best = chosen(start, taught, task.held_out, seed=seed)
    note = f"lr {best.lr:g}, far crops {best.negative_weight:g}, epochs {best.epochs}"
    print(f"  chosen: {note}", flush=True)
    strong, near = replace(start, negative_weight=0.3), replace(start, negative_weight=0.0)
    for name, one in (
        ("KR-NFT", best),
        ("- with the authors' weights", strong),
        ("- and their rate, epochs and single images", replace(strong, lr=1e-5, epochs=3, batch_size=1)),
        ("- no far crops", near),
        ("- no far crops, no networks of the image", replace(near, hidden=0)),
        ("- no far crops, all antibodies", replace(near, texts=whole)),
    ):
        found[name] = (one.fit_crops(taught.features, taught.labels), note)
    found["- whole images"] = (start.fit(task.fit.features, task.fit.labels), "")
    return found


def judged(task: Task, score: Detector, note: str) -> Scored:
    """Return what one score says of the images of a task, and what it accepts at a threshold of held-out images."""
    head_text = texts_of(task)

    def said(part: Features) -> Tensor:
        classify = score.logits if isinstance(score, KRNFT | GDA) else Head(head_text, 1.0).logits
        return classify(part.features).argmax(dim=1)

    held = task.held_out.features[said(task.held_out) == task.held_out.labels]
    threshold = float(np.quantile(score.predict(held).double().numpy(), MISS))
    known = score.predict(task.known.features).double().numpy()
    unknown = {name: score.predict(part.features).double().numpy() for name, part in task.unknown.items()}
    accepted = {key: float((values > threshold).mean()) for key, values in (unknown | {"known": known}).items()}
    return Scored(known, unknown, (said(task.known) == task.known.labels).double().numpy(), accepted, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of shots, crops and learning")
    parser.add_argument("--splits", type=int, default=5, help="how many of the five")
    parser.add_argument(
        "--features", type=Path, default=Path("runs/benchmark-immunity"), help="where features are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    every = open_data(TRAIN).class_names
    found: list[Row] = []
    for task in itertools.islice(emoji_splits(given.features), given.splits):
        print(task.name, flush=True)
        crops = cropped(given.features, given.seed)
        for name, (score, note) in scores_of(task, crops, every, given.seed).items():
            found.append(row(task, name, given.seed, judged(task, score, note)))
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    print("\n" + paired(found, "KR-NFT", ["neglabel", "max-logit", "energy", "gda"]))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

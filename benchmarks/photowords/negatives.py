"""KR-NFT on PhotoWords, beside NegLabel, whose texts it moves, and the largest cosine.

    python -m benchmarks.photowords.negatives --photographs imagenet-sample-images

The five splits of `benchmarks.photowords.antibodies`: half of the known photographs teach and set thresholds, the other
half, of other classes, and all unknown photographs are judged. A class has one photograph, so that no class that is
judged has taught any. Negatives are the bank's texts that name no unknown class. Constants are chosen on the first
half: of three parts of its classes one teaches, one is known and one stands for the unknown, each in turn. Crops are
encoded once (minutes of a core, kept in `--cache`).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustvlm.core.files import replacing
from robustvlm.core.seeds import generator
from robustvlm.defenses.immunity import antibodies as known
from robustvlm.detect import MCM, Detector, Energy, Head, MaxLogit, NegLabel
from robustvlm.detect.krnft import KRNFT
from robustvlm.detect.metrics import auroc

from ..common import exit_code_of
from .antibodies import Encoded, Row, Texts, encoded, judged, options, proposals, table, unnamed
from .parts import Parts, divided

GRID = tuple(itertools.product((1e-4, 1e-3), (0.0, 0.03)))
"""Rates and weights of far crops among which known classes choose."""
COUNT = 16
SCALE = 100.0


def cropped(photographs: Path, cache: Path, names: Sequence[str]) -> Tensor:
    """Return crops [N, 16, D] of the photographs of some classes, encoded once each."""
    from robustvlm.data import open_data, to_pixels
    from robustvlm.data.source import Sample
    from robustvlm.defenses.zoo.views import CROP_DRAWS, crops
    from robustvlm.models import load_model

    of = hashlib.sha256(photographs.read_bytes()).hexdigest()[:12]  # other photographs have other crops
    path = cache / f"crops-{COUNT}-{of}.pt"
    kept: dict[str, Tensor] = torch.load(path, weights_only=True) if path.exists() else {}
    missing = set(names) - set(kept)
    if missing:
        vlm, source = load_model("benchmarks.photowords.model:load"), open_data(f"parquet:{photographs}")
        with torch.no_grad():
            for item in source.samples():
                if isinstance(item, Sample) and source.class_names[item.label] in missing:
                    draws = torch.rand(COUNT, CROP_DRAWS, generator=generator(0, "crops", item.id))
                    views = crops(to_pixels(item.image, vlm.framing).expand(COUNT, -1, -1, -1), draws)
                    kept[source.class_names[item.label]] = vlm.encode_image(views)
        with replacing(path) as partial:
            torch.save(kept, partial)
    return torch.stack([kept[name] for name in names])


def chosen(start: KRNFT, crops: Tensor, whole: Tensor, labels: Tensor, seed: int) -> KRNFT:
    """Return the settings of the grid by which classes left out are told best from those that did not teach.

    With no setting above NegLabel's own AUROC by more than its standard error, no epoch is made.
    """
    part = torch.randperm(len(labels), generator=generator(seed, "parts")) % 3
    gains: dict[tuple[float, float], list[float]] = {values: [] for values in GRID}
    for number in range(3):
        teach, stay, gone = (part == number, part == (number + 1) % 3, part == (number + 2) % 3)
        rest = torch.ones(len(start.texts.head.class_embeddings), dtype=torch.bool)
        rest[labels[gone]] = False
        place = rest.cumsum(0) - 1
        texts = replace(start.texts, head=Head(start.texts.head.class_embeddings[rest], SCALE))

        def area(score: Detector, sides: tuple[Tensor, ...] = (whole[stay], whole[gone])) -> float:
            one, other = (score.predict(side).double().numpy() for side in sides)
            return auroc(one, other)

        base = area(texts)
        for lr, weight in GRID:
            one = replace(start, texts=texts, lr=lr, negative_weight=weight)
            gains[lr, weight].append(area(one.fit_crops(crops[teach], place[labels[teach]])) - base)
    best = max(gains, key=lambda values: float(np.mean(gains[values])))
    error = float(np.std(gains[best], ddof=1)) / 3**0.5
    print({values: round(float(np.mean(found)), 4) for values, found in gains.items()}, flush=True)
    changed: dict[str, Any] = {"lr": best[0], "negative_weight": best[1]}
    return replace(start, **(changed if np.mean(gains[best]) > error else {"epochs": 0}))


def split_rows(data: Encoded, parts: Parts, embed: Texts, photographs: Path, cache: Path, seed: int) -> dict[str, Row]:
    """Return the rows of one split by name."""
    names, text = list(parts.known), embed(parts.known)
    head, whole = Head(text, SCALE), data.of(parts.known)
    shown = [name for name in data.names if name in set(names)]
    labels = torch.tensor([names.index(name) for name in shown])
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    taught = cropped(photographs, cache, [shown[k] for k in half.tolist()])
    sides = {"known": whole[rest], "near": data.of(parts.near), "far": data.of(parts.far)}
    found: dict[str, Detector] = {"max cosine": MaxLogit(head), "energy": Energy(head), "mcm": MCM(head)}
    band = known.automatic_band(text[:, None], text)
    bank = proposals(names)["bank"]
    proposal = unnamed(bank, (*parts.near, *parts.far))
    vectors = known.filter_antibodies(proposal, embed, text[:, None], names, band=band).kept.embeddings
    texts = NegLabel(head, vectors, n_groups=max(1, min(10, len(vectors) // len(text))))
    start = KRNFT(texts, lr=1e-3, seed=seed)
    best = chosen(start, taught, whole[half], labels[half], seed)
    print(f"split {seed}: rate {best.lr:g}, far crops {best.negative_weight:g}, {best.epochs} epochs", flush=True)
    found["neglabel"] = replace(texts, n_groups=1)
    found["neglabel in groups"] = texts
    for title, one in (
        ("KR-NFT", best),
        ("- far crops at the authors' weight", replace(best, negative_weight=0.3)),
    ):
        found[title] = one.fit_crops(taught, labels[half])
    return {name: judged(score.predict, whole[half], sides) for name, score in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(options("negatives", argv)))


def run(given: argparse.Namespace) -> None:
    """Measure every split and print the table."""
    torch.set_num_threads(1)
    data = encoded(given.photographs, given.cache)
    pictures = given.cache / "photographs.parquet" if given.photographs.is_dir() else given.photographs
    embed = Texts(given.cache / "texts.pt")
    every = range(given.splits)
    print(table([split_rows(data, divided(data.tree, k), embed, pictures, given.cache, k) for k in every]))


if __name__ == "__main__":
    sys.exit(main())

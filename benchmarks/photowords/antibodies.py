"""What antibodies are worth on PhotoWords, honestly: as written, and without every text that names an unknown class.

    python -m benchmarks.photowords.antibodies --photographs imagenet-sample-images

Photographs and texts are encoded once (minutes; kept in `--cache`), all else is arithmetic on features. A split draws
known, near and far classes anew (`parts.divided`). Half of the known photographs sets every constant, among them the
threshold that is deployed (5 % miss, one for all classes); the other half, and all unknown ones, are judged.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustvlm.core.files import replacing
from robustvlm.data.names import words_of
from robustvlm.data.trees import Tree
from robustvlm.defenses.immunity import antibodies as known
from robustvlm.defenses.immunity.antibodies.sources import load_bank
from robustvlm.defenses.immunity.antibodies.texts import KnownNames
from robustvlm.defenses.immunity.choice import choose_hinge
from robustvlm.defenses.immunity.thresholds import fit_thresholds
from robustvlm.detect.base import Head
from robustvlm.detect.logits import MCM, Energy, MaxLogit
from robustvlm.detect.metrics import auroc, fpr_at_tpr
from robustvlm.detect.words import SDIS, Hinge, NegLabel
from robustvlm.errors import UserError
from robustvlm.stats import mean
from robustvlm.text import name_key

from ..common import exit_code_of, markdown
from .model import TEMPLATE
from .parts import Parts, divided

Array = npt.NDArray[np.float64]
Embed = Callable[[Sequence[str]], Tensor]
MISS = 0.05

SIDES = ("near", "far")


@dataclass(frozen=True, eq=False)
class Encoded:
    """Unit features [N, D] of the photographs with their class names [N], and the tree of all classes."""

    features: Tensor
    names: tuple[str, ...]
    tree: Tree

    def of(self, classes: Sequence[str]) -> Tensor:
        """Return the features of the photographs of some classes."""
        wanted = frozenset(classes)
        return self.features[[i for i, name in enumerate(self.names) if name in wanted]]


class Texts:
    """The sentence encoder behind a file of what it has said: a text is embedded once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept: dict[str, Any] = {"texts": [], "features": torch.zeros(0, 384)}
        if path.exists():
            kept = torch.load(path, weights_only=True)
        self.place = {text: i for i, text in enumerate(kept["texts"])}
        self.features: Tensor = kept["features"]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = list(dict.fromkeys(text for text in texts if text not in self.place))
        if new:
            from robustvlm.models.sentences import SentenceEncoder

            with torch.no_grad():
                found = SentenceEncoder().eval()([TEMPLATE.format(text) for text in new])
            self.place |= {text: len(self.place) + i for i, text in enumerate(new)}
            self.features = torch.cat([self.features, found])
            with replacing(self.path) as partial:
                torch.save({"texts": list(self.place), "features": self.features}, partial)
        return self.features[[self.place[text] for text in texts]]


def encoded(photographs: Path, cache: Path) -> Encoded:
    """Return the features of the photographs, encoded once for each file of photographs.

    Raises:
        UserError: no photographs there, or a package of the encoder is missing.
    """
    from robustvlm.data import open_data, to_pixels
    from robustvlm.data.source import Sample
    from robustvlm.models import load_model

    from .photographs import gathered, write_parquet

    cache.mkdir(parents=True, exist_ok=True)
    parquet = photographs
    if photographs.is_dir():
        parquet = cache / "photographs.parquet"
        if not parquet.exists():
            pictures = gathered(photographs)
            write_parquet(parquet, pictures, [item.class_name for item in pictures])
    source = open_data(f"parquet:{parquet}")
    if source.tree is None:
        raise UserError(f"'{parquet}' has no class tree: the photographs must be of ImageNet's classes")
    digest = hashlib.sha256(parquet.read_bytes()).hexdigest()[:12]
    kept = cache / f"photographs-{digest}.pt"
    if not kept.exists():
        vlm = load_model("benchmarks.photowords.model:load")
        rows, labels = [], []
        with torch.no_grad():
            for item in source.samples():
                if isinstance(item, Sample):
                    rows.append(vlm.encode_image(to_pixels(item.image, vlm.framing)[None])[0])
                    labels.append(item.label)
        with replacing(kept) as partial:
            torch.save({"features": torch.stack(rows).float(), "labels": labels}, partial)
    found = torch.load(kept, weights_only=True)
    names = tuple(source.class_names[label] for label in found["labels"])
    return Encoded(found["features"], names, source.tree[0])


# Antibodies of a split: from each source, as written and without what names an unknown class


def proposals(class_names: Sequence[str]) -> dict[str, known.Proposal]:
    """Return what each source proposes for some classes of ImageNet."""
    own = known.open_source("bank").propose(class_names)
    return {"bank": own, "superclasses": _of_superclasses(class_names)}


def _of_superclasses(class_names: Sequence[str]) -> known.Proposal:
    """Return the bank of before: what is written for the 44 superclasses."""
    from robustvlm.defenses.immunity.antibodies.llm import to_proposal
    from robustvlm.defenses.immunity.antibodies.sources import superclass_bank

    bank = superclass_bank()
    return to_proposal({name: bank[name] for name in class_names})


def unnamed(proposal: known.Proposal, unknown: Sequence[str]) -> known.Proposal:
    """Return the proposal without texts that name an unknown class, a synonym or kind of it, or a kind above it."""
    bank = load_bank("imagenet1k")
    names = KnownNames(unknown, {name: bank[name_key(name)].same for name in unknown if name_key(name) in bank})
    return replace(proposal, texts=tuple(text for text in proposal.texts if names.clash(text.text) is None))


# Scores and what is read off them


@dataclass(frozen=True)
class Row:
    """One score on one split: AUROC and FPR95 on near and far classes, the shares accepted, and the constants."""

    auroc: Mapping[str, float]
    fpr: Mapping[str, float]
    accepted: Mapping[str, float]
    weight: float | None = None


def judged(score: Callable[[Tensor], Tensor], calibration: Tensor, sides: Mapping[str, Tensor]) -> Row:
    """Return what a score says of `known`, `near` and `far`, with the threshold that the calibration images set."""
    values = {name: np.asarray(score(part).double().numpy()) for name, part in sides.items()}
    set_by = np.asarray(score(calibration).double().numpy())
    tau = fit_thresholds(set_by, np.zeros(len(set_by), dtype=np.int64), 1, miss=MISS).values[0]
    return Row(
        {side: auroc(values["known"], values[side]) for side in SIDES},
        {side: fpr_at_tpr(values["known"], values[side]) for side in SIDES},
        {name: float((found > tau).mean()) for name, found in values.items()},
    )


def shared(head: Head, antibodies: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the score cos + share: the largest cosine and the softmax share of the classes among classes and texts."""
    others = NegLabel(head, antibodies)
    return lambda features: head.cosines(features).amax(dim=1) + others.score(features).sigmoid()


def split_rows(data: Encoded, parts: Parts, embed: Embed, seed: int) -> tuple[dict[str, Row], dict[str, list[float]]]:
    """Return the rows of one split by name, and by source the coverage foretold and that of the near classes."""
    names, text = list(parts.known), embed(parts.known)
    head, whole = Head(text, 100.0), data.of(parts.known)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([names.index(name) for name in data.names if name in set(names)])
    half, rest = order[: len(order) // 2], order[len(order) // 2 :]
    calibration = whole[half]
    sides = {"known": whole[rest], "near": data.of(parts.near), "far": data.of(parts.far)}
    rows = {
        "max cosine": judged(MaxLogit(head).score, calibration, sides),
        "energy": judged(Energy(head).score, calibration, sides),
        "mcm": judged(MCM(head).score, calibration, sides),
        "msp (mcm at the model's temperature)": judged(MCM(head, 0.01).score, calibration, sides),
    }
    band = known.automatic_band(text[:, None], text)
    unknown = (*parts.near, *parts.far)
    made: dict[str, tuple[known.Antibodies, known.Returning | None]] = {}
    foretold: dict[str, list[float]] = {}
    for source, whole_proposal in proposals(names).items():
        for told, proposal in (("", whole_proposal), (", -unk", unnamed(whole_proposal, unknown))):
            found = known.filter_antibodies(proposal, embed, text[:, None], names, band=band).kept
            made[source + told] = found, known.returning(proposal, names, text, band=band)
            around = known.neighbourhood(found, text, names, proposal=proposal, band=band)
            strange = embed(parts.near)
            hit = (strange @ found.embeddings.T).amax(dim=1) > (strange @ text.T).amax(dim=1)
            named = {words_of(item.text) for item in found.texts}
            foretold[source + told] = [
                len(found),
                float(around.covered.double().mean()),
                float(hit.double().mean()),
                float(np.mean([words_of(name) in named for name in parts.near])),
            ]
    made["noise"] = known.noise_antibodies(10 * len(names), text.shape[1], seed=seed), None
    for source, (found, back) in made.items():
        vectors = found.embeddings
        choice = choose_hinge(calibration, labels[half], text[:, None], found, names, returning=back, seed=seed)
        scores: dict[str, Callable[[Tensor], Tensor]] = {
            "hinge": Hinge(text, vectors, choice.weight, choice.floor).score,
            "hinge, w 1": Hinge(text, vectors, 1.0, choice.floor).score,
            "s-dis, .25": SDIS(text, vectors, 0.25).score,
            "s-dis, .5": SDIS(text, vectors, 0.5).score,
            "s-dis, 1": SDIS(text, vectors, 1.0).score,
            "neglabel": NegLabel(head, vectors).score,
            "cos + share": shared(head, vectors),
        }
        for name, score in scores.items():
            row = judged(score, calibration, sides)
            rows[f"{name} | {source}"] = replace(row, weight=choice.weight) if name == "hinge" else row
    return rows, foretold


def table(splits: Sequence[Mapping[str, Row]]) -> str:
    """Return the table: means over the splits with Student's 95 % intervals, and paired differences of AUROC."""
    base = [split["max cosine"] for split in splits]
    lines = []
    for name in splits[0]:
        rows = [split[name] for split in splits]
        cells = [name]
        for side in SIDES:
            cells.append(_mean([row.auroc[side] for row in rows]))
            less = [row.auroc[side] - plain.auroc[side] for row, plain in zip(rows, base, strict=True)]
            cells.append("" if name == "max cosine" else _signed(less))
            cells.append(_mean([row.fpr[side] for row in rows]))
        cells += [f"{np.mean([row.accepted[part] for row in rows]):.3f}" for part in ("known", *SIDES)]
        cells.append(", ".join(f"{row.weight:g}" for row in rows) if rows[0].weight is not None else "")
        lines.append(cells)
    columns = [f"{what} {side}" for side in SIDES for what in ("AUROC", "less max cosine,", "FPR95")]
    return markdown(["score", *columns, "known accepted", "near accepted", "far accepted", "weights chosen"], lines)


def _mean(values: Sequence[float]) -> str:
    found = mean(values)
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _signed(values: Sequence[float]) -> str:
    found = mean(values)
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def coverage_table(splits: Sequence[Mapping[str, list[float]]]) -> str:
    """Return what coverage was foretold from known names alone, and what it was of the near classes' names."""
    lines = []
    for source in splits[0]:
        count, foretold, met, named = np.mean([split[source] for split in splits], axis=0)
        lines.append([source, f"{count:.0f}", f"{foretold:.2f}", f"{met:.2f}", f"{named:.2f}"])
    return markdown(["antibodies", "kept", "foretold", "of near names", "near names among them"], lines)


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    return exit_code_of(lambda: run(options("antibodies", argv)))


def options(program: str, argv: list[str] | None) -> argparse.Namespace:
    """Read the options of a program that measures on splits of the photographs.

    Raises:
        UserError: too few splits for an interval.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.photowords.{program}")
    parser.add_argument("--photographs", type=Path, required=True, help="a copy of the repository, or a Parquet file")
    parser.add_argument("--cache", type=Path, default=Path("runs/photowords/features"), help="folder of the features")
    parser.add_argument("--splits", type=int, default=5)
    given = parser.parse_args(argv)
    if given.splits < 2:
        raise UserError(f"intervals need at least 2 splits, got {given.splits}: pass --splits 5")
    return given


def run(given: argparse.Namespace) -> None:
    """Measure every split and print both tables."""
    data = encoded(given.photographs, given.cache)
    embed = Texts(given.cache / "texts.pt")
    found = [split_rows(data, divided(data.tree, seed), embed, seed) for seed in range(given.splits)]
    print(table([rows for rows, _ in found]), coverage_table([foretold for _, foretold in found]), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())

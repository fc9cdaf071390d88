"""AdaNeg beside the scores that remember nothing: half of the images came in before, the other half is judged.

python -m benchmarks.detect.streams emoji
python -m benchmarks.detect.streams photowords --photographs imagenet-sample-images

A stream is half of the known images and half of one unknown set, mixed; each half is judged with the other as its
stream. A drawing (a class, of photographs) is in one half; with --apart image its copies on other backgrounds may be in
both, so that the same things come again. `met as they are judged` remembers the judged images, as the paper does; the
scores are those after the last one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import exit_code_of
from benchmarks.detect.sources import Kept
from benchmarks.detect.tables import Found, judge, table
from robustvlm.commands.detect.scoring import score_all
from robustvlm.data import open_data
from robustvlm.data.names import same_things
from robustvlm.defenses import load_classifier
from robustvlm.detect import AdaNeg, Detector, Energy, Head, MaxLogit, NegLabel, outside, tree_words
from robustvlm.detect.words import mine_negatives
from robustvlm.errors import UserError


@dataclass(frozen=True, eq=False)
class Group:
    """Features [N, D] of a set of images, and of each the drawing, class or image that is in one half alone [N]."""

    features: Tensor
    shows: Sequence[str]

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the features of both halves; no drawing is in both."""
        names = sorted(set(self.shows))
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        first = {names[i] for i in order[: len(order) // 2]}
        mask = torch.tensor([name in first for name in self.shows])
        return self.features[mask], self.features[~mask]


def streams(head: Head, words: Tensor, known: Group, unknown: Mapping[str, Group], seeds: int) -> Found:
    """Return AUROC and FPR95 of every score by unknown set, two figures for each seed."""
    texts = NegLabel(head, words[mine_negatives(words, head.class_embeddings)])
    found: Found = {}
    for seed in range(seeds):
        for side in (0, 1):
            before, later = _turned(known.halves(seed), side)
            for name, group in unknown.items():
                strange, judged = _turned(group.halves(seed), side)
                for title, score in _scores(head, texts, (before, strange), (later, judged), seed).items():
                    judge(found, title, score_all(score, later), {name: score_all(score, judged)})
    return found


def _turned(halves: tuple[Tensor, Tensor], side: int) -> tuple[Tensor, Tensor]:
    return halves if side == 0 else halves[::-1]


def _scores(
    head: Head, texts: NegLabel, stream: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor], seed: int
) -> dict[str, Detector]:
    return {
        "MaxLogit": MaxLogit(head),
        "Energy": Energy(head),
        "NegLabel": texts,
        "AdaNeg": AdaNeg(texts).remember(_mixed(stream, seed)),
        "AdaNeg, plain means": AdaNeg(texts, sharpness=0.0).remember(_mixed(stream, seed)),
        "AdaNeg, known images alone in the stream": AdaNeg(texts).remember(stream[0]),
        "AdaNeg, met as they are judged": AdaNeg(texts).remember(_mixed(judged, seed)),
    }


def _mixed(parts: tuple[Tensor, Tensor], seed: int) -> Tensor:
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def emoji(options: argparse.Namespace) -> None:
    """Known and unknown emoji of a style that nothing was trained on; a drawing has four copies."""
    source = open_data("emoji")
    kept = Kept(options.cache, load_classifier("tiny", source.class_names, source.templates))
    head = Head(kept.classifier.class_embeddings, kept.classifier.logit_scale)  # type: ignore[arg-type]
    specs = {name: f"emoji?split={name}&styles=twemoji" for name in ("near", "far")}
    words = kept.words(source, [open_data(spec) for spec in specs.values()])
    unknown = {name: _group(kept, spec, options.apart) for name, spec in specs.items()}
    known = _group(kept, "emoji", options.apart)
    print(table(streams(head, words, known, unknown, options.seeds), list(unknown)))


def _group(kept: Kept, spec: str, apart: str) -> Group:
    found, source = kept.answers(spec), open_data(spec)
    assert found.features is not None
    return Group(found.features, found.ids if apart == "image" else [source.group(name) for name in found.ids])


def photowords(options: argparse.Namespace) -> None:
    """Known, near and far photographs of a split; one photograph a class, so that the stream shows other classes."""
    from benchmarks.photowords.antibodies import Texts, encoded
    from benchmarks.photowords.parts import divided

    if options.photographs is None:
        raise UserError("PhotoWords needs its photographs: pass --photographs DIRECTORY or FILE.parquet")
    data = encoded(options.photographs, options.cache)
    embed = Texts(options.cache / "texts.pt")
    found: Found = {}
    for seed in range(options.seeds):
        parts = divided(data.tree, seed)
        words = outside(tree_words(), parts.known, None)
        naming = same_things(words, [*parts.near, *parts.far])
        chosen = embed(tuple(word for word in words if word not in naming))
        groups = {name: Group(data.of(classes), _names(data.names, classes)) for name, classes in _sides(parts).items()}
        known = groups.pop("known")
        for title, by_set in streams(Head(embed(parts.known), 100.0), chosen, known, groups, 1).items():
            for name, pairs in by_set.items():
                found.setdefault(title, {}).setdefault(name, []).extend(pairs)
    print(table(found, ["near", "far"]))


def _sides(parts: object) -> dict[str, tuple[str, ...]]:
    return {name: getattr(parts, name) for name in ("known", "near", "far")}


def _names(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    wanted = frozenset(classes)
    return [name for name in names if name in wanted]


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detect.streams")
    parser.add_argument("set", choices=("emoji", "photowords"))
    parser.add_argument("--photographs", type=Path, help="a copy of the repository, or a Parquet file (photowords)")
    parser.add_argument("--apart", choices=("drawing", "image"), default="drawing", help="what is in one half (emoji)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark-detect"), help="folder of kept features")
    options = parser.parse_args(argv)
    return exit_code_of(lambda: (emoji if options.set == "emoji" else photowords)(options))


if __name__ == "__main__":
    sys.exit(main())

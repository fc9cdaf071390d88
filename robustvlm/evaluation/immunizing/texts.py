"""The texts of an immunize run: class embeddings, and antibodies from whichever source, filtered and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import acos, degrees
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.data import DataSource
from robustvlm.data.classes import read_class_names
from robustvlm.data.names import name_key
from robustvlm.data.nouns import same_things
from robustvlm.defenses.immunity.antibodies import (
    Antibodies,
    Band,
    Dropped,
    automatic_band,
    coverage,
    filter_antibodies,
    margins,
    noise_antibodies,
    open_source,
)
from robustvlm.errors import UserError
from robustvlm.llm import LlmClient
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.runs.immunize_config import ImmunizeConfig

NOISE_PER_CLASS = 10
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Made:
    """The antibodies of a run, those dropped with reasons, and the band (None where nothing was filtered).

    `naming` are the proposed texts that name a class of an unknown set that is measured on, with its spec.
    """

    antibodies: Antibodies
    dropped: tuple[Dropped, ...]
    band: Band | None
    naming: Mapping[str, str] = field(default_factory=dict)


def embedder(vlm: VLM, templates: Sequence[str]) -> Callable[[Sequence[str]], Tensor]:
    """Return the function from names to unit text embeddings [N, D] on the CPU, with the prompts of the data."""
    return lambda texts: class_embeddings(vlm, list(texts), templates).float().cpu()


def source_spec(text: str) -> str:
    """Return the antibody source that a command names; a file may be named without `file:`.

    Example:
        >>> source_spec("bank"), source_spec("my/antibodies.json")
        ('bank', 'file:my/antibodies.json')
    """
    if text in ("bank", "wordnet", "llm", "noise", "none") or text.startswith("file:"):
        return text
    if Path(text).suffix or Path(text).exists():
        return f"file:{text}"
    return text


def make_antibodies(
    config: ImmunizeConfig,
    source: DataSource,
    embed: Callable[[Sequence[str]], Tensor],
    prototypes: Tensor,
    text: Tensor,
    *,
    unknown: Sequence[DataSource] = (),
    client: LlmClient | None = None,
    on_classes: Callable[[int], None] | None = None,
) -> Made:
    """Return the antibodies of all classes: generated, filtered by name and by band.

    Those that name a class of an unknown set are dropped unless the settings ask for an oracle: the model would be told
    what it is then tested on.

    Args:
        prototypes: [K, M, D]. text: class embeddings [K, D]. unknown: the sets that will be measured on.

    Raises:
        UserError: an unknown source, or no band that leaves room.
    """
    dim = text.shape[1]
    if config.antibodies == "none":
        return Made(Antibodies((), torch.zeros(0, dim)), (), None)
    if config.antibodies == "noise":
        count = NOISE_PER_CLASS * len(source.class_names)
        return Made(noise_antibodies(count, dim, seed=config.seed), (), None)
    opened = open_source(config.antibodies, client=client, on_classes=on_classes)
    proposal = opened.propose(source.class_names)
    texts = [text.text for text in proposal.texts]
    naming = {text: other.spec for other in reversed(unknown) for text in same_things(texts, other.things())}
    told = () if config.oracle_words else tuple(text for text in proposal.texts if text.text in naming)
    proposal = replace(proposal, texts=tuple(text for text in proposal.texts if text not in told))
    band = automatic_band(prototypes, text, safe=config.safe, risk=config.risk)
    found = filter_antibodies(proposal, embed, prototypes, source.class_names, band=band, above=superclasses(source))
    gone = [Dropped(text, f"it names a class of the unknown set '{naming[text.text]}'") for text in told]
    return Made(found.kept, (*found.dropped, *gone), band, naming)


def superclasses(source: DataSource) -> tuple[str, ...]:
    """Return the names above the classes in the data's trees: no antibodies either."""
    names: dict[str, None] = {}
    for tree in source.tree or ():
        for level in range(1, tree.levels):
            names.update(dict.fromkeys(tree.level_names(level)))
    classes = set(map(name_key, source.class_names))
    return tuple(name for name in names if name_key(name) not in classes)


def diagnose(
    made: Made, prototypes: Tensor, embed: Callable[[Sequence[str]], Tensor], near_names: str | None, seed: int
) -> dict[str, Any]:
    """Return coverage and margins of the antibodies.

    Coverage: the share of texts within an angle of an antibody, where the angle is that of the upper bound of the band
    (nearer than known classes are to each other). The texts are those of `near_names`; and always the antibodies
    themselves, each fifth held against the other four.
    """
    antibodies = made.antibodies
    nearest = margins(antibodies, prototypes)
    found: dict[str, Any] = {"margin_min": float(nearest.min()), "margin_median": float(nearest.median())}
    if made.band is None or not len(antibodies):
        return found
    angle = degrees(acos(max(-1.0, min(1.0, made.band.risk))))
    found |= {"angle": angle, "coverage_crossed": _crossed(antibodies, angle, seed)}
    if near_names is not None:
        names, _ = read_class_names(Path(near_names))
        if not isinstance(names, tuple):
            raise UserError(f"'{near_names}' maps labels to names: expected a list, one name a line")
        within = coverage(antibodies, embed(list(names)), angle)
        found |= {"coverage_near": float(within.double().mean()), "near_names": len(names)}
    return found


def _crossed(antibodies: Antibodies, angle: float, seed: int) -> float | None:
    """Return the share of antibodies that the other four fifths cover; None for fewer than five."""
    count = len(antibodies)
    if count < _FOLDS:
        return None
    fold = torch.randperm(count, generator=generator(seed, "coverage")) % _FOLDS
    hits = 0
    for i in range(_FOLDS):
        rest = [row for row in range(count) if fold[row] != i]
        others = Antibodies(tuple(antibodies.texts[row] for row in rest), antibodies.embeddings[rest])
        hits += int(coverage(others, antibodies.embeddings[fold == i], angle).sum())
    return hits / count

"""Which proposed antibodies are kept: no name of a known class, inside the band, none twice; the rest with reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.defenses.immunity.antibodies.band import Band, class_cosines
from robustvlm.defenses.immunity.antibodies.names import find_clash, find_same, words_of
from robustvlm.defenses.immunity.antibodies.texts import CONTEXT, Antibodies, AntibodyText, Proposal
from robustvlm.errors import UserError

Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Dropped:
    """An antibody that was not kept, and why."""

    antibody: AntibodyText
    reason: str


@dataclass(frozen=True)
class Filtered:
    """The antibodies kept, those dropped with reasons, and the band they were held against."""

    kept: Antibodies
    dropped: tuple[Dropped, ...]
    band: Band


def filter_antibodies(
    proposal: Proposal,
    embed: Embed,
    prototypes: Tensor,
    class_names: Sequence[str],
    *,
    band: Band,
    above: Sequence[str] = (),
) -> Filtered:
    """Keep the proposed texts that lie in the band of their class, below `risk` for every class, and name none.

    Immuno-VLM (arXiv 2605.30745), phase 2. First names are compared (nothing that names a known class, a kind of one or
    what one is a kind of is embedded), then similarities; of a text proposed twice, the class nearest to it keeps it.

    Args:
        proposal: what a source proposes; texts for other classes than `class_names` are an error.
        embed: from texts to unit embeddings [N, D], as `class_embeddings` with the templates of the data.
        prototypes: unit vectors [K, D] or [K, M, D].
        band: see `automatic_band`.
        above: names of superclasses, which are no antibodies either: the inner nodes of the class trees.

    Raises:
        UserError: a text for an unknown class.

    Example:
        >>> texts = tuple(AntibodyText(text, "dog") for text in ("puppy dog", "wolf", "teapot", "hound"))
        >>> angles = {"wolf": 0.8, "teapot": 1.5, "hound": 0.1}
        >>> def embed(texts):
        ...     angle = torch.tensor([angles[text] for text in texts])
        ...     return torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> found = filter_antibodies(Proposal(texts), embed, torch.eye(2), ["dog", "cat"], band=Band(0.2, 0.95))
        >>> [text.text for text in found.kept.texts], len(found.dropped)
        (['wolf'], 3)
    """
    _check_classes(proposal, class_names)
    named, dropped = _by_name(proposal, class_names, above)
    unique = list(dict.fromkeys(text.text for text in named))
    embeddings = embed(unique) if unique else prototypes.new_zeros(0, prototypes.shape[-1])
    cosines = class_cosines(embeddings, prototypes.to(embeddings))
    row_of, column_of = {text: i for i, text in enumerate(unique)}, {name: i for i, name in enumerate(class_names)}
    kept: list[tuple[AntibodyText, float]] = []
    for text in named:
        row, own = cosines[row_of[text.text]], column_of[text.of_class]
        reason = _outside(row, own, class_names, band)
        if reason is None:
            kept.append((text, row[own].item()))
        else:
            dropped.append(Dropped(text, reason))
    texts, repeated = _once(kept)
    rows = torch.tensor([row_of[text.text] for text in texts], dtype=torch.long, device=embeddings.device)
    return Filtered(Antibodies(texts, embeddings[rows]), (*dropped, *repeated), band)


def _by_name(
    proposal: Proposal, class_names: Sequence[str], above: Sequence[str]
) -> tuple[list[AntibodyText], list[Dropped]]:
    kept: list[AntibodyText] = []
    dropped: list[Dropped] = []
    for text in proposal.texts:
        if text.kind == CONTEXT:
            reason = find_same(text.text, class_names)
        else:
            reason = find_clash(text.text, class_names, proposal.kin) or find_same(text.text, above)
        if reason is None:
            kept.append(text)
        else:
            dropped.append(Dropped(text, reason))
    return kept, dropped


def _outside(row: Tensor, own: int, class_names: Sequence[str], band: Band) -> str | None:
    """Return why cosines [K] to the classes are not those of an antibody of class `own`, or None."""
    cosine, nearest = row[own].item(), int(row.argmax())
    if row[nearest].item() >= band.risk:
        return f"too near to '{class_names[nearest]}': cosine {row[nearest].item():.3f}, must be below {band.risk:.3f}"
    if cosine <= band.safe:
        return f"too far from '{class_names[own]}': cosine {cosine:.3f}, must be above {band.safe:.3f}"
    return None


def _once(kept: Sequence[tuple[AntibodyText, float]]) -> tuple[tuple[AntibodyText, ...], list[Dropped]]:
    """Keep each text once, for the class that it is nearest to; the first of equals."""
    best: dict[tuple[str, ...], tuple[AntibodyText, float]] = {}
    for text, cosine in kept:
        key = words_of(text.text)
        if key not in best or cosine > best[key][1]:
            best[key] = (text, cosine)
    chosen = {id(text) for text, _ in best.values()}
    texts = tuple(text for text, _ in kept if id(text) in chosen)
    repeated = [
        Dropped(text, f"proposed twice, kept for '{best[words_of(text.text)][0].of_class}'")
        for text, _ in kept
        if id(text) not in chosen
    ]
    return texts, repeated


def _check_classes(proposal: Proposal, class_names: Sequence[str]) -> None:
    for text in proposal.texts:
        if text.of_class not in class_names:
            raise UserError(f"the antibody '{text.text}' is for '{text.of_class}', which is none of the known classes")

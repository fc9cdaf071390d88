"""Which proposed antibodies are kept: no known class, inside the band, none twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.data.names import words_of
from robustvlm.defenses.immunity.antibodies.texts import CONTEXT, Antibodies, AntibodyText, KnownNames, Proposal
from robustvlm.errors import UserError

# The band of similarity that an antibody must lie in: near enough to its class to matter, not so near as to be it

SAFE_QUANTILE = 0.5
RISK_QUANTILE = 0.99
OWN_QUANTILE = 0.1


@dataclass(frozen=True)
class Band:
    """Bounds on the cosine between an antibody and the prototype of its class (Immuno-VLM, arXiv 2605.30745).

    Raises:
        UserError: not -1 <= safe < risk <= 1.

    Example:
        >>> Band(0.4, 0.8).holds(0.5), Band(0.4, 0.8).holds(0.9)
        (True, False)
    """

    safe: float
    risk: float

    def __post_init__(self) -> None:
        if not -1.0 <= self.safe < self.risk <= 1.0:
            raise UserError(
                f"the band of antibodies needs -1 <= safe < risk <= 1 (cosines), got {self.safe:g} and {self.risk:g}"
            )

    def holds(self, cosine: float) -> bool:
        """Whether a cosine lies strictly inside."""
        return self.safe < cosine < self.risk

    def __str__(self) -> str:
        return f"{self.safe:.3f} to {self.risk:.3f}"


def class_cosines(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of every row to every class, [A, K]: of several prototypes of a class, the largest.

    Args:
        embeddings: unit rows [A, D].
        prototypes: unit vectors [K, D], or [K, M, D] with M prototypes a class.
    """
    if prototypes.ndim == 2:
        return embeddings @ prototypes.T
    return torch.einsum("ad,kmd->akm", embeddings, prototypes).amax(dim=-1)


def automatic_band(
    prototypes: Tensor, text_embeddings: Tensor, *, safe: float | None = None, risk: float | None = None
) -> Band:
    """Return the band from the similarities between known classes, what is given taken as it is.

    Our reading; the paper leaves the choice open. A class's name is the best-known text that is *not* another class, so
    cosines between text t_j and prototype k != j say what "another thing" looks like in this space. `safe` is their
    median: below it, an antibody is no closer to its class than a random other class is, and teaches nothing. `risk` is
    the 0.99 quantile, over the classes, of the cosine to their nearest other class: above it, a text is closer than
    two known classes ever are (names that come twice aside), and is more likely a synonym. Where the texts of the
    classes lie lower than that at their own prototypes (images and texts apart), `risk` is the lower decile of those.

    Args:
        prototypes: unit vectors [K, D] or [K, M, D], K >= 2.
        text_embeddings: unit text embeddings of the class names [K, D].

    Example:
        >>> axes = torch.eye(3)
        >>> nearby = torch.nn.functional.normalize(axes + 0.3, dim=-1)
        >>> print(automatic_band(axes, nearby, risk=0.9))
        0.219 to 0.900
    """
    cosines = class_cosines(text_embeddings, prototypes).double()
    same = torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    others = cosines[~same]
    nearest = cosines.masked_fill(same, -2.0).amax(dim=0)
    own = torch.quantile(cosines.diagonal(), OWN_QUANTILE).item()
    low = torch.quantile(others, SAFE_QUANTILE).item() if safe is None else safe
    high = min(torch.quantile(nearest, RISK_QUANTILE).item(), own) if risk is None else risk
    if low >= high and (safe is None or risk is None):
        raise UserError(
            f"no band of antibodies between {low:.3f} and {high:.3f}: the texts of the classes are as near to other "
            "classes as to their own; pass both bounds yourself (--band SAFE,RISK)"
        )
    return Band(low, high)


# Which proposed antibodies are kept: no name of a known class, inside the band, none twice; the rest with reasons

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
    what one is a kind of is embedded), then similarities. A text proposed for several classes counts once, for the
    nearest of them.

    Args:
        proposal: what a source proposes; texts for other classes than `class_names` are an error.
        embed: from texts to unit embeddings [N, D], as `class_embeddings` with the templates of the data.
        prototypes: unit vectors [K, D] or [K, M, D].
        band: see `automatic_band`.
        above: names of superclasses, which are no antibodies either: the inner nodes of the class trees.

    Raises:
        UserError: a text for an unknown class.

    Example:
        >>> import torch
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
    known = KnownNames(class_names, proposal.kin, above)
    groups = _by_name(proposal.texts)
    reasons = {key: _name_clash(known, texts) for key, texts in groups.items()}
    named = [texts for key, texts in groups.items() if reasons[key] is None]
    embeddings = embed([texts[0].text for texts in named]) if named else prototypes.new_zeros(0, prototypes.shape[-1])
    dropped = [Dropped(groups[key][0], reason) for key, reason in reasons.items() if reason is not None]
    kept: list[AntibodyText] = []
    rows: list[int] = []
    column_of = {name: i for i, name in enumerate(class_names)}
    for i, (texts, row) in enumerate(zip(named, class_cosines(embeddings, prototypes.to(embeddings)), strict=True)):
        text = max(texts, key=lambda text: row[column_of[text.of_class]].item())
        reason = _outside(row, column_of[text.of_class], class_names, band)
        if reason is None:
            kept.append(text)
            rows.append(i)
        else:
            dropped.append(Dropped(text, reason))
    return Filtered(Antibodies(tuple(kept), embeddings[rows]), tuple(dropped), band)


def _by_name(texts: Sequence[AntibodyText]) -> dict[tuple[str, ...], list[AntibodyText]]:
    """Return the texts grouped by what they say, in the order in which each is said first."""
    groups: dict[tuple[str, ...], list[AntibodyText]] = {}
    for text in texts:
        groups.setdefault(words_of(text.text), []).append(text)
    return groups


def _name_clash(known: KnownNames, texts: Sequence[AntibodyText]) -> str | None:
    # In an odd setting the class's name is meant to stand in the text.
    contexts = all(text.kind == CONTEXT for text in texts)
    return known.same(texts[0].text) if contexts else known.clash(texts[0].text)


def _outside(row: Tensor, own: int, class_names: Sequence[str], band: Band) -> str | None:
    """Return why cosines [K] to the classes are not those of an antibody of class `own`, or None."""
    cosine, nearest = row[own].item(), int(row.argmax())
    if row[nearest].item() >= band.risk:
        return f"too near to '{class_names[nearest]}': cosine {row[nearest].item():.3f}, must be below {band.risk:.3f}"
    if cosine <= band.safe:
        return f"too far from '{class_names[own]}': cosine {cosine:.3f}, must be above {band.safe:.3f}"
    return None


def _check_classes(proposal: Proposal, class_names: Sequence[str]) -> None:
    known = frozenset(class_names)
    for text in proposal.texts:
        if text.of_class not in known:
            raise UserError(f"the antibody '{text.text}' is for '{text.of_class}', which is none of the known classes")

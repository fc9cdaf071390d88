"""Whether antibodies are any good: do they cover what they should, and do they keep clear of the classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.data.names import words_of
from robustvlm.defenses.immunity.antibodies.filters import Band, class_cosines
from robustvlm.defenses.immunity.antibodies.texts import Antibodies, Proposal
from robustvlm.errors import UserError


def coverage(antibodies: Antibodies, held_out: Tensor, angle: float) -> Tensor:
    """Return, for each held-out text of unknown things [N, D], whether an antibody lies within `angle` degrees: [N].

    The share of True is the coverage that the theory of Immuno-VLM (arXiv 2605.30745) asks for.

    Raises:
        UserError: an angle outside 0 to 180.

    Example:
        >>> from robustvlm.defenses.immunity.antibodies.texts import AntibodyText
        >>> one = Antibodies((AntibodyText("wolf", "dog"),), torch.tensor([[1.0, 0.0]]))
        >>> coverage(one, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 30.0)
        tensor([ True, False])
    """
    if not 0.0 <= angle <= 180.0:
        raise UserError(f"the angle must be between 0 and 180 degrees, got {angle:g}")
    return nearest_angles(antibodies, held_out) <= angle


def nearest_angles(antibodies: Antibodies, held_out: Tensor) -> Tensor:
    """Return the angle in degrees from each unit row [N, D] to the nearest antibody, [N]; 180 where there is none."""
    if not len(antibodies):
        return torch.full((len(held_out),), 180.0)
    cosines = (held_out @ antibodies.embeddings.to(held_out).T).amax(dim=1)
    # Rounding gives cosines a little above 1, and equal vectors a degree or so of angle.
    return cosines.clamp(-1.0, 1.0).arccos() * (180.0 / math.pi)


def margins(antibodies: Antibodies, prototypes: Tensor) -> Tensor:
    """Return each class's margin to the nearest antibody, 1 - max_a <mu_k, a>, [K]; 2 where there is none.

    Args:
        antibodies: unit embeddings [A, D].
        prototypes: unit vectors [K, D] or [K, M, D].
    """
    if not len(antibodies):
        return torch.full((len(prototypes),), 2.0)
    return 1.0 - class_cosines(antibodies.embeddings.to(prototypes), prototypes).amax(dim=0)


# How much of the neighbourhood of the classes antibodies cover: each class left out in turn stands for an unknown thing


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """For each class [K], left out: is its name one of the others' antibodies, and how near are antibodies and classes.

    Attributes:
        named: an antibody of another class is its name. to_antibody, to_class: the largest cosine of its name to the
            antibodies of the other classes (1 where named), and to the names of the other classes.
    """

    named: Tensor
    to_antibody: Tensor
    to_class: Tensor

    @property
    def covered(self) -> Tensor:
        """Whether the name lies nearer to an antibody than to any class, [K]."""
        return self.to_antibody > self.to_class


def neighbourhood(
    antibodies: Antibodies,
    text: Tensor,
    class_names: Sequence[str],
    *,
    proposal: Proposal | None = None,
    prototypes: Tensor | None = None,
    band: Band | None = None,
) -> Neighbourhood:
    """Return what antibodies would do for a thing like the classes that is none of them, by leaving out each in turn.

    A class that is left out takes the antibodies with it that guard it: nobody would have written them. Those of other
    classes that are its name come back, which the filters dropped for naming a known class, if the band would have let
    them pass. Its name, as a text, then stands for the unknown thing.

    Args:
        antibodies: those kept. text: unit embeddings of the class names [K, D], K >= 2.
        proposal: what was proposed before the filters; None: no antibody names a class.
        prototypes, band: what the filters held the antibodies against; None: the texts, and no band.

    Raises:
        UserError: fewer than two classes.

    Example:
        >>> from robustvlm.defenses.immunity.antibodies.texts import AntibodyText
        >>> texts = AntibodyText("wolf", "dog"), AntibodyText("cat", "dog")
        >>> text = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
        >>> kept = Antibodies(texts[:1], torch.tensor([[0.6, 0.8, 0.0]]))
        >>> found = neighbourhood(kept, text, ["dog", "cat"], proposal=Proposal(texts))
        >>> found.named.tolist(), found.covered.tolist()
        ([False, True], [False, True])
    """
    if len(class_names) < 2:
        raise UserError(f"coverage leaves out one class of several, got {len(class_names)}")
    among = text @ text.T
    own = torch.eye(len(text), dtype=torch.bool, device=text.device)
    to_class = among.masked_fill(own, -1.0).amax(dim=1)
    near = text @ antibodies.embeddings.to(text).T
    place = {name: k for k, name in enumerate(class_names)}
    guarded = torch.tensor([place.get(item.of_class, -1) for item in antibodies.texts], dtype=torch.int64)
    near = near.masked_fill(guarded[None] == torch.arange(len(text))[:, None], -1.0)
    to_antibody = near.amax(dim=1) if len(antibodies) else torch.full_like(to_class, -1.0)
    named = torch.zeros(len(text), dtype=torch.bool)
    named[returning(proposal, class_names, text, prototypes=prototypes, band=band).named] = True
    return Neighbourhood(named, torch.where(named, torch.ones_like(to_antibody), to_antibody), to_class)


@dataclass(frozen=True, eq=False)
class Returning:
    """Antibodies that name a known class, and that would be there if the class were none.

    Attributes:
        embeddings: unit rows [R, D], the texts of the classes that they name. named, of_class: numbers [R] of the class
            that each names, and of that for which it was proposed.
    """

    embeddings: Tensor
    named: Tensor
    of_class: Tensor


def returning(
    proposal: Proposal | None,
    class_names: Sequence[str],
    text: Tensor,
    *,
    prototypes: Tensor | None = None,
    band: Band | None = None,
) -> Returning:
    """Return the proposed texts that the filters drop for naming one known class, where the band lets them pass.

    Args:
        text: unit embeddings of the class names [K, D]. proposal, prototypes, band: as for `neighbourhood`.
    """
    pairs: dict[tuple[int, int], None] = {}
    if proposal is not None:
        meant = {words_of(other): name for name, kin in proposal.kin.items() for other in kin}
        meant |= {words_of(name): name for name in class_names}
        place = {name: k for k, name in enumerate(class_names)}
        cosines = class_cosines(text, text if prototypes is None else prototypes.to(text))
        for item in proposal.texts:
            k, j = place.get(meant.get(words_of(item.text), ""), -1), place.get(item.of_class, -1)
            if k >= 0 and j >= 0 and k != j and _passes(cosines[k], k, j, band):
                pairs[k, j] = None
    named, of_class = (torch.tensor([pair[side] for pair in pairs], dtype=torch.int64) for side in (0, 1))
    return Returning(text[named], named, of_class)


def _passes(cosines: Tensor, own: int, of_class: int, band: Band | None) -> bool:
    """Whether a text at the name of class `own`, with that class gone, lies in the band of another class."""
    if band is None:
        return True
    others = torch.cat([cosines[:own], cosines[own + 1 :]])
    return float(others.max()) < band.risk and float(cosines[of_class]) > band.safe

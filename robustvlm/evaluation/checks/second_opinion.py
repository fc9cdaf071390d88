"""What a published program says of the images that our attacks left: every disagreement, with a paired test."""

from __future__ import annotations

from collections.abc import Sequence

from robustvlm.attacks import FOOLED, ROBUST
from robustvlm.runs.results import AttackFact, CleanFact
from robustvlm.runs.summary import Check
from robustvlm.stats import mcnemar_exact

_SHOWN = 10  # ids in a sentence


def of_second_opinion(clean: Sequence[CleanFact], found: Sequence[AttackFact], *, attack: str) -> list[Check]:
    """Return a check per eps: did the attack that came last break an image that all others had left?

    The paired test compares our verdicts with those of both programs together, over the images that were right when
    clean: an image that we fooled is fooled for both, so only those that they alone broke count.

    Example:
        >>> of_second_opinion([], [], attack="autoattack")
        []
    """
    exposed = {fact.index: fact.image_id for fact in clean if fact.exposed}
    radii = sorted({fact.eps for fact in found})
    return [_at(eps, exposed, found, attack, several=len(radii) > 1) for eps in radii]


def _at(eps: float, exposed: dict[int, str], found: Sequence[AttackFact], attack: str, *, several: bool) -> Check:
    rows = [fact for fact in found if fact.attack == attack and fact.eps == eps]
    again = [fact for fact in rows if fact.outcome in (FOOLED, ROBUST)]
    broken = sorted(fact.index for fact in again if fact.outcome == FOOLED)
    name = f"second opinion at eps {eps:.4g}" if several else "second opinion"
    gone = {fact.index for fact in found if fact.eps <= eps and fact.outcome == FOOLED}
    missing = len(exposed.keys() - gone - {fact.index for fact in rows})
    if missing:
        message = f"The run ended before '{attack}' had attacked all images again that withstood: {missing} are left."
        return Check(name=name, level="note", message=message)
    if not again:
        return Check(name=name, level="ok", message=f"No image was left for '{attack}' to attack again.")
    images = f"{len(again)} image{'s' if len(again) != 1 else ''}"
    if not broken:
        message = f"'{attack}' attacked the {images} again that withstood our own attacks, and broke none."
        return Check(name=name, level="ok", message=message)
    ours = {fact.index for fact in found if fact.attack != attack and fact.eps <= eps and fact.outcome == FOOLED}
    order = sorted(exposed)
    test = mcnemar_exact([i in ours for i in order], [i in ours or i in broken for i in order])
    ids = ", ".join(f"'{exposed[i]}'" for i in broken[:_SHOWN]) + (", ..." if len(broken) > _SHOWN else "")
    message = (
        f"'{attack}' broke {len(broken)} of the {images} that withstood our own attacks ({ids}): they count as fooled. "
        "Give our attacks more steps; images that still fall to it alone are a bug worth reporting, with the image and "
        "this run's settings. "
        f"Paired test of our verdicts against those of both together, {test.total} images: p = {test.p_value:.2g}."
    )
    return Check(name=name, level="fault", message=message)

"""Whether parts fit together: each was made for a certain model, known by its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustvlm.defenses.build.recipe import KIND_OF, Recipe
from robustvlm.errors import UserError
from robustvlm.models.saved import Card, read_card


@dataclass(frozen=True)
class Part:
    """A run that becomes a part: its name in the recipe, its folder, its card."""

    name: str
    folder: Path
    card: Card


def read_parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """Return the runs of a recipe in the order in which they stand on each other.

    Raises UserError where a folder is no model, or one of another kind.
    """
    return tuple(_part(name, Path(folder).expanduser()) for name, folder in recipe.parts)


def _part(name: str, folder: Path) -> Part:
    wanted = KIND_OF[name]
    card = read_card(folder) if folder.is_dir() else None
    if card is None:
        what = "holds no model" if folder.is_dir() else "is no folder"
        raise UserError(f"--{name} takes the folder of a run of `robustvlm {wanted}`; '{folder}' {what}")
    if card.kind != wanted:
        raise UserError(
            f"--{name} takes the folder of a run of `robustvlm {wanted}`; '{folder}' is one of `robustvlm {card.kind}`"
        )
    return Part(name, folder, card)


@dataclass(frozen=True)
class Misfit:
    """A part that was made for another model than the one it is put on.

    Args:
        part: which. on: spec of the model it is put on. harmless: it was made for a model whose clean features are the
            same (the encoder without its purifier), so that only its behaviour on noisy images was never seen.
    """

    part: Part
    on: str
    harmless: bool

    def __str__(self) -> str:
        made_for = self.part.card.base or "another model"
        again = f"`robustvlm {KIND_OF[self.part.name]} {self.on}` makes one that fits"
        if self.harmless:
            return f"'{self.part.folder}' was made for '{made_for}', the encoder without its purifier: {again} better"
        return f"'{self.part.folder}' was made for '{made_for}', not for '{self.on}': {again}"


def misfit(part: Part, on: str, fingerprint: str, clean: Sequence[str] = ()) -> Misfit | None:
    """Return what is wrong with putting a part on a model, None if it was made for that model.

    Args:
        on, fingerprint: of the model it is put on. clean: fingerprints of models that have the same clean features.

    Example:
        >>> part = Part("immunize", Path("runs/i"), Card("immunize", base="tiny", base_fingerprint="ab"))
        >>> misfit(part, "runs/p", "ab") is None, misfit(part, "runs/p", "cd", clean=["ab"]).harmless
        (True, True)
        >>> str(misfit(part, "runs/p", "cd"))
        "'runs/i' was made for 'tiny', not for 'runs/p': `robustvlm immunize runs/p` makes one that fits"
    """
    known = part.card.base_fingerprint
    if known is None or known == fingerprint:
        return None
    return Misfit(part, on, harmless=known in clean)

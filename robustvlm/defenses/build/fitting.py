"""Whether parts fit together: each was made for a certain model, known by its fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustvlm.defenses.build.recipe import KIND_OF, Recipe
from robustvlm.defenses.saved import saved_model
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
        noise: levels whose thresholds it would apply to noisy features of a model that they were not made for.
    """

    part: Part
    on: str
    harmless: bool
    noise: tuple[float, ...] = ()

    def __str__(self) -> str:
        made_for = self.part.card.base or "another model"
        again = f"`robustvlm {KIND_OF[self.part.name]} {self.on}` makes one that fits"
        if self.harmless:
            return f"'{self.part.folder}' was made for '{made_for}', the encoder without its purifier: {again} better"
        levels = ", ".join(f"{level:g}" for level in self.noise)
        noisy = f", and so were its thresholds for noise of {levels}" if levels else ""
        return f"'{self.part.folder}' was made for '{made_for}', not for '{self.on}'{noisy}: {again}"


def misfit(
    part: Part, on: str, fingerprint: str, clean: Sequence[str] = (), noise: Sequence[float] = ()
) -> Misfit | None:
    """Return what is wrong with putting a part on a model, None if it was made for that model.

    Args:
        on, fingerprint: of the model it is put on. clean: fingerprints of models that have the same clean features.
        noise: levels for which the part has thresholds that the pipeline would use: what they were fitted to are noisy
            features, which differ where clean ones are the same, so that the part is not harmless.

    Example:
        >>> part = Part("immunize", Path("runs/i"), Card("immunize", base="tiny", base_fingerprint="ab"))
        >>> misfit(part, "runs/p", "ab") is None, misfit(part, "runs/p", "cd", clean=["ab"]).harmless
        (True, True)
        >>> str(misfit(part, "runs/p", "cd"))
        "'runs/i' was made for 'tiny', not for 'runs/p': `robustvlm immunize runs/p` makes one that fits"
        >>> misfit(part, "runs/p", "cd", clean=["ab"], noise=[0.25]).harmless
        False
    """
    known = part.card.base_fingerprint
    if known is None or known == fingerprint:
        return None
    return Misfit(part, on, harmless=known in clean and not noise, noise=tuple(noise))


@dataclass(frozen=True)
class Unfitted:
    """A head that is smoothed with noise for which it has no thresholds."""

    part: Part
    sigma: float

    def __str__(self) -> str:
        return (
            f"'{self.part.folder}' has no thresholds for noise of {self.sigma:g}: smoothed, it uses those set without "
            "noise, and `certify --claim openset` refuses the pipeline; "
            f"`robustvlm immunize ... --sigma {self.sigma:g}` sets them"
        )


def levels_used(part: Part, sigma: float | None) -> tuple[float, ...]:
    """Return the noise levels of the part's thresholds that a pipeline with this smoothing could use.

    Without a smoothing of its own (None) any: a pipeline can be smoothed later, by an operator.
    """
    made = saved_model(str(part.folder))
    levels = () if made is None else made.noise_levels
    return tuple(level for level in levels if sigma in (None, level))


def unfitted(part: Part, sigma: float | None) -> Unfitted | None:
    """Return what is to be said of a head that is smoothed without thresholds for the noise, None if it has them."""
    made = saved_model(str(part.folder))
    if sigma is None or made is None or not made.refuses or sigma in made.noise_levels:
        return None
    return Unfitted(part, sigma)

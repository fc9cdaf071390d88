"""What a pipeline is put together from, and whether its parts were made for each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robustvlm.defenses.pipeline import check_operations, saved_model
from robustvlm.defenses.spec import Operation, split_spec
from robustvlm.errors import UserError
from robustvlm.models.saved import Card, read_card

# What a pipeline is put together from, and the order in which its parts stand

KIND_OF = {"purify": "purify", "immunize": "immunize"}
"""For every part that is a run: the kind of run that it has to be."""


@dataclass(frozen=True)
class Recipe:
    """The parts of a pipeline: purifier, encoder, mapper, smoothing, immunised head.

    Args:
        encoder: spec of the encoder, plain or robust, without operators.
        purify: folder of a purify run: purifier and mapper.
        smooth: noise and samples as `SIGMA[:N0]`.
        immunize: folder of an immunize run: adapter, prototypes, antibodies and thresholds.

    Raises:
        UserError: an operator on the encoder, or nothing to build.

    Example:
        >>> Recipe("tiny", smooth="0.25:32").smoothing
        (Operation(name='smooth', arguments=('0.25', '32')),)
    """

    encoder: str
    purify: str | None = None
    smooth: str | None = None
    immunize: str | None = None

    def __post_init__(self) -> None:
        operations = split_spec(self.encoder)[1]
        if operations:
            advice = "pass --smooth instead" if operations[0].name == "smooth" else "leave it out"
            raise UserError(f"the encoder '{self.encoder}' comes with an operator, +{operations[0]}: {advice}")
        check_operations(f"--smooth {self.smooth}", self.smoothing)
        if not (self.purify or self.smooth or self.immunize):
            raise UserError("nothing to build: pass --purify RUN, --smooth SIGMA or --immunize RUN")

    @property
    def smoothing(self) -> tuple[Operation, ...]:
        """The smoothing as an operation, if there is one."""
        return smoothing_of(self.smooth)

    @property
    def sigma(self) -> float | None:
        """Noise level of the smoothing, None without one."""
        return float(self.smoothing[0].arguments[0]) if self.smoothing else None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """Name and folder of the parts that are runs, in the order in which they stand on each other."""
        named = (("purify", self.purify), ("immunize", self.immunize))
        return tuple((name, folder) for name, folder in named if folder is not None)


def smoothing_of(smooth: str | None) -> tuple[Operation, ...]:
    """Return `SIGMA[:N0]` as an operation, nothing for None.

    Example:
        >>> smoothing_of("0.25")
        (Operation(name='smooth', arguments=('0.25',)),)
    """
    return () if smooth is None else (Operation("smooth", tuple(smooth.split(":"))),)


# Whether parts fit together: each was made for a certain model, known by its fingerprint


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

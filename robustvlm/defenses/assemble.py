"""Pipelines put together from runs: purifier, encoder, mapper, smoothing, immunised head, copied into one folder."""

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from robustvlm.certify import OpensetRule
from robustvlm.certify.threats import Ellipsoid, Noise, read_noise
from robustvlm.core.files import replacing
from robustvlm.core.framing import trial_pixels
from robustvlm.defenses import pipeline
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.smoothing import Rule, read_rule
from robustvlm.defenses.specs import Operation, split_spec
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, read_card, write_card
from robustvlm.runs.manifest import FILES
from robustvlm.text import one_line

# What a pipeline is put together from, and the order in which its parts stand

KIND_OF = {"purify": "purify", "immunize": "immunize"}
"""For every part that is a run: the kind of run that it has to be."""


@dataclass(frozen=True)
class Recipe:
    """The parts of a pipeline: purifier, encoder, mapper, smoothing, immunised head.

    Args:
        encoder: spec of the encoder, plain or robust, without operators.
        purify: folder of a purify run: purifier and mapper.
        smooth: noise, samples and how the model answers, as `[THREAT=]SIGMA[:N0[:ALPHA[:vote]]]`.
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
        pipeline.check_operations(f"--smooth {self.smooth}", self.smoothing)
        if not (self.purify or self.smooth or self.immunize):
            raise UserError("nothing to build: pass --purify RUN, --smooth SIGMA or --immunize RUN")
        rule = read_rule(str(self.smoothing[0])) if self.smoothing else None
        if self.immunize and rule is not None and not rule.votes:
            raise UserError(
                f"the copies of an immunised head answer by vote, for a class or for none of them: pass --smooth "
                f"{self.smooth}:vote, or leave out ALPHA"
            )

    @property
    def smoothing(self) -> tuple[Operation, ...]:
        """The smoothing as an operation, if there is one."""
        return smoothing_of(self.smooth)

    @property
    def sigma(self) -> float | None:
        """Noise level of a smoothing against changes of pixels, for which parts may be made; None without one."""
        noise = self.noise
        return noise.sigma if noise is not None and noise.threat.of_pixels else None

    @property
    def noise(self) -> Noise | None:
        """The noise of the smoothing, None without one."""
        return read_noise(self.smoothing[0].arguments[0]) if self.smoothing else None

    @property
    def pinned(self) -> str | None:
        """The smoothing with the digest of its map, where it has one: a map that has changed since is refused."""
        noise = self.noise
        if noise is None or not isinstance(noise.threat, Ellipsoid):
            return self.smooth
        return ":".join([str(noise), *self.smoothing[0].arguments[1:]])

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
            f"`robustvlm immunize ... --sigma {self.sigma:g}` sets them, from images (not with --no-images)"
        )


def levels_used(part: Part, sigma: float | None) -> tuple[float, ...]:
    """Return the noise levels of the part's thresholds that a pipeline with this smoothing could use.

    Without a smoothing of its own (None) any: a pipeline can be smoothed later, by an operator.
    """
    made = pipeline.saved_model(str(part.folder))
    levels = () if made is None else made.noise_levels
    return tuple(level for level in levels if sigma in (None, level))


def unfitted(part: Part, sigma: float | None) -> Unfitted | None:
    """Return what is to be said of a head that is smoothed without thresholds for the noise, None if it has them."""
    made = pipeline.saved_model(str(part.folder))
    if sigma is None or made is None or not made.refuses or sigma in made.noise_levels:
        return None
    return Unfitted(part, sigma)


# Copies of models: all that a folder's model needs, and nothing of the run that made it

RECORDS = frozenset({"run.lock", *(name for name, made in FILES.items() if not made.copied)})
"""What a run keeps beside its model: records, checkpoints, pictures."""

_DEEPEST = 20


def copy_model(spec: str, target: Path) -> str:
    """Copy the model that `spec` names to the folder `target` if it is a folder; return the spec of the copy.

    The models that it stands on are copied too, as far as they are folders, each into `base` within. Anything but a
    folder (a bundled or published model, a checkpoint file, the user's own code) is left where it is and named.

    Raises:
        UserError: cards that lead back to themselves.

    Example:
        >>> import tempfile
        >>> copy_model("tiny", Path(tempfile.mkdtemp()) / "encoder")
        'tiny'
    """
    return _copied(spec, target, depth=0)


def copy_part(source: Path, target: Path, card: Card) -> None:
    """Copy a folder's model without the models that it stands on, under another card, which is written last."""
    _copy_files(source, target)
    write_card(target, card)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in _files(source):
        with replacing(target / path.relative_to(source)) as temporary:
            shutil.copyfile(path, temporary)


def _copied(spec: str, target: Path, *, depth: int) -> str:
    if depth > _DEEPEST:
        raise UserError(f"the models below '{spec}' stand on each other without end")
    place, operations = split_spec(spec)
    source = Path(os.path.expanduser(place))
    if not source.is_dir():
        return spec
    card = read_card(source)
    if card is None:
        _copy_files(source, target)
    else:
        base = None if card.base is None else _copied(card.base, target / "base", depth=depth + 1)
        copy_part(source, target, dataclasses.replace(card, base=base))
    return "+".join([str(target), *map(str, operations)])


def _files(folder: Path) -> list[Path]:
    """Return the files of a model: not the card, nor the run's records and leftovers, nor models inside its folder."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name in RECORDS or path.name == CARD_NAME or path.name.startswith((".", "journal")):
            continue
        if path.is_file():
            found.append(path)
        elif path.is_dir() and not path.is_symlink() and not (path / CARD_NAME).is_file():
            found += _files(path)
    return found


# Putting a pipeline together: copies of the parts in one folder, each standing on the one before

PARTS = "parts"


def build_pipeline(
    recipe: Recipe, folder: Path, *, accept_misfits: bool = False, device: torch.device | str = "cpu"
) -> tuple[VLM, tuple[Misfit | Unfitted, ...]]:
    """Copy the parts of a recipe into `folder`; return the pipeline, loaded from there, and what does not fit.

    The folder is self-contained: whatever was a folder is copied (encoder, purifier and mapper, immunised head), what
    is named otherwise (a bundled or published model, the user's own code) stays named, with its fingerprint.

    Args:
        accept_misfits: put parts together that were made for other models; they are returned.

    Raises:
        UserError: a part is missing, of another kind, made for another model, or does not work on this one.
    """
    parts = read_parts_of(recipe)
    (folder / CARD_NAME).unlink(missing_ok=True)  # not a model until all of it is there
    spec = copy_model(recipe.encoder, folder / PARTS / "encoder")
    vlm = pipeline.load_pipeline(spec, device=device)
    found: list[Misfit | Unfitted] = []
    shown, clean = recipe.encoder, [vlm.fingerprint]
    for part in parts:
        wrong = misfit(part, shown, vlm.fingerprint, clean, levels_used(part, recipe.sigma))
        if wrong is None:
            pipeline.require_same_base(part.card, vlm, part.folder)
        else:
            if not wrong.harmless and not accept_misfits:
                raise UserError(f"{wrong}; --accept-misfits builds it anyway")
            found.append(wrong)
        bare = _judging(part, recipe)
        found += [] if bare is None else [bare]
        spec, vlm = _put_on(part, spec, vlm, folder / PARTS / part.name, device)
        shown, clean = str(part.folder), [*clean, vlm.fingerprint]
    _try_out(pipeline.apply_operations(vlm, recipe.smoothing), recipe)
    settings = {"smooth": recipe.pinned}
    write_card(folder, Card("build", spec, vlm.fingerprint, settings, probe_encoder(vlm)))
    return pipeline.load_pipeline(str(folder), device=device), tuple(found)


def _judging(part: Part, recipe: Recipe) -> Unfitted | None:
    """Say what a head lacks for the noise; refuse one whose copies could not vote."""
    made = pipeline.saved_model(str(part.folder))
    if recipe.noise is None or not recipe.smoothing or read_rule(str(recipe.smoothing[0])) is None or made is None:
        return unfitted(part, recipe.sigma)
    made.require_votes(recipe.noise)
    return None


def _put_on(part: Part, spec: str, vlm: VLM, target: Path, device: torch.device | str) -> tuple[str, VLM]:
    """Copy a part with a card that names the model before it; return its spec and itself."""
    copy_part(part.folder, target, _on(part.card, spec, vlm))
    return str(target), pipeline.load_pipeline(str(target), device=device)


def _on(card: Card, spec: str, vlm: VLM) -> Card:
    """Return the card of a part that stands on another model now, or on a copy of its own."""
    return dataclasses.replace(card, base=spec, base_fingerprint=vlm.fingerprint, base_probe=probe_encoder(vlm))


def _try_out(vlm: VLM, recipe: Recipe) -> None:
    """Encode one image with parts that may have been made for another model."""
    pixels = trial_pixels(1, vlm.image_size, device=vlm.device)
    try:
        with torch.no_grad():
            widths = vlm.encode_image(pixels).shape[1], vlm.encode_text(["a photo"]).shape[1]
    except RuntimeError as error:
        said = one_line(error, limit=200)
        raise UserError(f"the parts do not work together on '{recipe.encoder}' ({said})") from error
    if widths[0] != widths[1]:
        raise UserError(f"the parts give image features of {widths[0]} dimensions, text features of {widths[1]}")


# A folder of kind `build` as a model: the last of its parts, smoothed as its card says


class BuiltModel(pipeline.SavedModel):
    """A whole pipeline; smoothing, if it has one, is part of its encoder, and the head is that of its last part."""

    @property
    def smoothing(self) -> tuple[Operation, ...]:
        """The smoothing that the card names, checked.

        Raises:
            UserError: the card is damaged.
        """
        said = self.card.settings.get("smooth")
        wrong = f"the card of '{self.folder}' names no smoothing SIGMA[:N0]"
        if not isinstance(said, str | None):
            raise UserError(f'{wrong}, as the text "0.25:64" or "0.25:64:0.001", but {said!r}: build it again')
        operations = smoothing_of(said)
        try:
            pipeline.check_operations(str(self.folder), operations)
        except UserError as error:
            raise UserError(f"{wrong} ({error}): build it again") from None
        return operations

    @property
    def noise(self) -> Noise | None:
        return read_noise(self.smoothing[0].arguments[0]) if self.smoothing else None

    @property
    def rule(self) -> Rule | None:
        return read_rule(str(self.smoothing[0])) if self.smoothing else None

    def encoder(self, device: torch.device) -> VLM:
        smoothing = self.smoothing  # a damaged card should not wait for a large model
        return pipeline.apply_operations(self.base(device), smoothing)

    @property
    def _top(self) -> pipeline.SavedModel | None:
        """The last of the parts, whose head the pipeline has."""
        return pipeline.saved_model(split_spec(self.card.base or "")[0])

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return None if self._top is None else self._top.class_names

    @property
    def refuses(self) -> bool:
        return self._top is not None and self._top.refuses

    @property
    def noise_levels(self) -> tuple[float, ...]:
        return () if self._top is None else self._top.noise_levels

    def class_vectors(self, class_names: Sequence[str]) -> torch.Tensor | None:
        return None if self._top is None else self._top.class_vectors(class_names)

    def voting(self, encoder: VLM, class_names: Sequence[str], noise: Noise) -> VLM:
        top = self._top
        return super().voting(encoder, class_names, noise) if top is None else top.voting(encoder, class_names, noise)

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule | None:
        return None if self._top is None else self._top.openset_rule(class_names, sigma, tau)

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        top = self._top
        if top is None:
            return super().classifier(encoder, class_names, templates, cache=cache)
        return top.classifier(encoder, class_names, templates, cache=cache)

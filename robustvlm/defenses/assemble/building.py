"""Putting a pipeline together, copies of the parts in one folder, and that folder as a model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from robustvlm.certify import OpensetRule
from robustvlm.core.files import replacing
from robustvlm.defenses.assemble import fitting
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.pipeline import (
    SavedModel,
    apply_operations,
    check_operations,
    load_pipeline,
    require_same_base,
    saved_model,
)
from robustvlm.defenses.spec import Operation, split_spec
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import CARD_NAME, Card, read_card, write_card
from robustvlm.runs.manifest import FILES
from robustvlm.text import one_line

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
    recipe: fitting.Recipe, folder: Path, *, accept_misfits: bool = False, device: torch.device | str = "cpu"
) -> tuple[VLM, tuple[fitting.Misfit | fitting.Unfitted, ...]]:
    """Copy the parts of a recipe into `folder`; return the pipeline, loaded from there, and what does not fit.

    The folder is self-contained: whatever was a folder is copied (encoder, purifier and mapper, immunised head), what
    is named otherwise (a bundled or published model, the user's own code) stays named, with its fingerprint.

    Args:
        accept_misfits: put parts together that were made for other models; they are returned.

    Raises:
        UserError: a part is missing, of another kind, made for another model, or does not work on this one.
    """
    parts = fitting.read_parts_of(recipe)
    (folder / CARD_NAME).unlink(missing_ok=True)  # not a model until all of it is there
    spec = copy_model(recipe.encoder, folder / PARTS / "encoder")
    vlm = load_pipeline(spec, device=device)
    found: list[fitting.Misfit | fitting.Unfitted] = []
    shown, clean = recipe.encoder, [vlm.fingerprint]
    for part in parts:
        wrong = fitting.misfit(part, shown, vlm.fingerprint, clean, fitting.levels_used(part, recipe.sigma))
        if wrong is None:
            require_same_base(part.card, vlm, part.folder)
        else:
            if not wrong.harmless and not accept_misfits:
                raise UserError(f"{wrong}; --accept-misfits builds it anyway")
            found.append(wrong)
        bare = fitting.unfitted(part, recipe.sigma)
        found += [] if bare is None else [bare]
        spec, vlm = _put_on(part, spec, vlm, folder / PARTS / part.name, device)
        shown, clean = str(part.folder), [*clean, vlm.fingerprint]
    _try_out(apply_operations(vlm, recipe.smoothing), recipe)
    settings = {"smooth": recipe.smooth}
    write_card(folder, Card("build", spec, vlm.fingerprint, settings, probe_encoder(vlm)))
    return load_pipeline(str(folder), device=device), tuple(found)


def _put_on(part: fitting.Part, spec: str, vlm: VLM, target: Path, device: torch.device | str) -> tuple[str, VLM]:
    """Copy a part with a card that names the model before it; return its spec and itself."""
    copy_part(part.folder, target, _on(part.card, spec, vlm))
    return str(target), load_pipeline(str(target), device=device)


def _on(card: Card, spec: str, vlm: VLM) -> Card:
    """Return the card of a part that stands on another model now, or on a copy of its own."""
    return dataclasses.replace(card, base=spec, base_fingerprint=vlm.fingerprint, base_probe=probe_encoder(vlm))


def _try_out(vlm: VLM, recipe: fitting.Recipe) -> None:
    """Encode one image with parts that may have been made for another model."""
    size = vlm.image_size
    pixels = torch.linspace(0, 1, 3 * size * size, device=vlm.device).view(1, 3, size, size)
    try:
        with torch.no_grad():
            widths = vlm.encode_image(pixels).shape[1], vlm.encode_text(["a photo"]).shape[1]
    except RuntimeError as error:
        said = one_line(error, limit=200)
        raise UserError(f"the parts do not work together on '{recipe.encoder}' ({said})") from error
    if widths[0] != widths[1]:
        raise UserError(f"the parts give image features of {widths[0]} dimensions, text features of {widths[1]}")


# A folder of kind `build` as a model: the last of its parts, smoothed as its card says


class BuiltModel(SavedModel):
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
            raise UserError(f'{wrong}, as the text "0.25:64", but {said!r}: build it again')
        operations = fitting.smoothing_of(said)
        try:
            check_operations(str(self.folder), operations)
        except UserError as error:
            raise UserError(f"{wrong} ({error}): build it again") from None
        return operations

    @property
    def sigma(self) -> float | None:
        return float(self.smoothing[0].arguments[0]) if self.smoothing else None

    def encoder(self, device: torch.device) -> VLM:
        smoothing = self.smoothing  # a damaged card should not wait for a large model
        return apply_operations(self.base(device), smoothing)

    @property
    def _top(self) -> SavedModel | None:
        """The last of the parts, whose head the pipeline has."""
        return saved_model(split_spec(self.card.base or "")[0])

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

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule | None:
        return None if self._top is None else self._top.openset_rule(class_names, sigma, tau)

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        top = self._top
        if top is None:
            return super().classifier(encoder, class_names, templates, cache=cache)
        return top.classifier(encoder, class_names, templates, cache=cache)

"""Models that this program made: which part of it loads which kind of folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.certify import OpensetRule
from robustvlm.core.probe import change_of
from robustvlm.core.user_code import named_by
from robustvlm.defenses.base import Classifier, ZeroShot
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM, zero_shot
from robustvlm.models.probe import probe_encoder
from robustvlm.models.saved import Card, read_card, require_ground

KINDS = {
    "finetune": "robustvlm.defenses.finetune.saved:FinetunedModel",
    "soup": "robustvlm.defenses.finetune.saved:FinetunedModel",
    "purify": "robustvlm.defenses.purify.saved:PurifiedModel",
    "immunize": "robustvlm.defenses.immunity.saved:ImmunisedModel",
    "tune-prompts": "robustvlm.defenses.prompts.saved:PromptTunedModel",
    "build": "robustvlm.defenses.build.saved:BuiltModel",
}
"""Where the loader of each kind of folder is found; imported when it is needed."""

_loading: ContextVar[tuple[Path, ...]] = ContextVar("loading", default=())


@dataclass(frozen=True)
class SavedModel(ABC):
    """A folder with a card, as a model; a kind says how to make its encoder, and its classifier if it has a head.

    Attributes:
        folder: where its files are.
        card: what it says of itself.
    """

    folder: Path
    card: Card

    @abstractmethod
    def encoder(self, device: torch.device) -> VLM:
        """Return the encoder, frozen, on `device`; whatever belongs inside a smoothing expectation is part of it."""

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the classifier on `encoder`, which is `self.encoder(...)`, perhaps smoothed: zero-shot by default."""
        return ZeroShot(zero_shot(encoder, class_names, templates, cache=cache)).eval()

    @property
    def refuses(self) -> bool:
        """Whether its classifier may reject images, by a rule that certificates know."""
        return False

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that the model was made for, where it knows no others; None: any classes will do."""
        return None

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        """Return unit vectors [K, D] that stand for the classes in place of their texts; None: the texts do."""
        del class_names
        return None

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule | None:
        """Return the rule by which the model behind noise of `sigma` accepts and rejects; None for one without.

        Args:
            tau: threshold for all classes in place of the model's: the rule is then no longer the deployed one.

        Raises:
            UserError: what the deployed model does under this noise is no such rule.
        """
        del class_names, sigma, tau
        return None

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """Noise levels for whose mean features its head has thresholds, and judges the mean as certificates do."""
        return ()

    @property
    def sigma(self) -> float | None:
        """Noise level of a smoothing that is part of the model, None without one."""
        return None

    def base(self, device: torch.device) -> VLM:
        """Return the model that this one stands on.

        Raises:
            UserError: the card names none, it is gone, it has changed since, or the models stand on each other.
        """
        from robustvlm.defenses.pipeline import load_pipeline

        if self.card.base is None:
            raise UserError(f"the card of '{self.folder}' names no base model: make the model again")
        with _once(self.folder), named_by(f"the card of '{self.folder}'"):
            vlm = load_pipeline(self.card.base, device=device)
        require_same_base(self.card, vlm, self.folder)
        return vlm


def require_same_base(card: Card, vlm: VLM, folder: Path) -> None:
    """Refuse another model than the one that a folder was made for, by its digest and by what it answers.

    Raises:
        UserError: what differs.
    """
    different = None
    if card.base_fingerprint not in (None, vlm.fingerprint):
        different = "its weights or settings are others"
    elif card.base_probe is not None:
        different = change_of(card.base_probe, probe_encoder(vlm))
    if different is not None:
        raise UserError(
            f"the model '{card.base}' is no longer the one that '{folder}' was made for ({different}): "
            "bring that one back, or make this one again"
        )


def saved_model(spec: str) -> SavedModel | None:
    """Return the model of a folder with a card; None for any other spec.

    Raises UserError for a kind that this version does not know.
    """
    place = os.path.expanduser(spec)
    card = read_card(Path(place)) if os.path.isdir(place) else None
    if card is None:
        return None
    require_ground(Path(place), card)
    if card.kind not in KINDS:
        raise UserError(f"'{spec}' is a model of the unknown kind '{card.kind}'; {nearest(card.kind, KINDS)}")
    module, _, name = KINDS[card.kind].partition(":")
    loader: type[SavedModel] = getattr(import_module(module), name)
    return loader(Path(place), card)


@contextmanager
def _once(folder: Path) -> Iterator[None]:
    """Refuse to load a folder while it is being loaded: a card that leads back to itself would never end."""
    here = folder.resolve()
    if here in _loading.get():
        raise UserError(f"the model '{folder}' stands on itself: its {', '.join(map(str, _loading.get()))} lead back")
    token = _loading.set((*_loading.get(), here))
    try:
        yield
    finally:
        _loading.reset(token)

"""A folder of kind `immunize` as a model: encoder, head, and the rules that certificates know."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify import OpensetRule
from robustvlm.certify.threats import Noise
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.immunity.classifier import ImmunisedClassifier
from robustvlm.defenses.immunity.state import AdaptedVLM, Immunity, load_immunity
from robustvlm.defenses.immunity.votes import OpenVotes, at_copies, voting
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM


class ImmunisedModel(SavedModel):
    """The adapted encoder; smoothing, where there is one, goes between it and the head."""

    @cached_property
    def immunity(self) -> Immunity:
        """Prototypes, antibodies, thresholds and adapter."""
        return load_immunity(self.folder, self.card.settings)

    @property
    def refuses(self) -> bool:
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.immunity.class_names)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        return tuple(sorted(self.immunity.noisy))

    def encoder(self, device: torch.device) -> VLM:
        base = self.base(device)
        return AdaptedVLM(base, self.immunity.adapter)

    def classifier(
        self, encoder: VLM, class_names: Sequence[str], templates: Sequence[str], *, cache: bool = True
    ) -> Classifier:
        """Return the immunised classifier; `class_names` are its classes, in any order."""
        del templates, cache  # the prototypes are kept here
        immunity = self.immunity.ordered(class_names, str(self.folder))
        if isinstance(encoder, SmoothedVLM) and encoder.rule is not None:
            return OpenVotes(encoder, immunity, str(self.folder))
        return ImmunisedClassifier(encoder, immunity)

    def require_votes(self, noise: Noise) -> None:
        at_copies(self.immunity, noise, str(self.folder))

    def voting(self, encoder: VLM, class_names: Sequence[str], noise: Noise) -> VLM:
        return voting(encoder, self.immunity.ordered(class_names, str(self.folder)), noise, str(self.folder))

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        """Return the prototypes.

        Raises:
            UserError: other classes, or several prototypes a class: the class is then no linear function of features.
        """
        found = self.immunity.ordered(class_names, str(self.folder)).prototypes
        if found.shape[1] > 1:
            raise UserError(
                f"'{self.folder}' has {found.shape[1]} prototypes a class, and certificates of classes need one: "
                "pass --claim openset or feature, or immunise with --prototypes-per-class 1"
            )
        return found[:, 0]

    def openset_rule(self, class_names: Sequence[str], sigma: float, tau: float | None = None) -> OpensetRule:
        """Return the rule for the mean feature under noise, with the thresholds for that noise or with `tau`.

        Raises:
            UserError: neither is there. The deployed model then scales the mean to unit length before it meets the
                thresholds that were set without noise, which is another rule than any that is linear in the mean.
        """
        found = self.immunity.ordered(class_names, str(self.folder))
        count, per_class, dim = found.prototypes.shape
        if tau is not None:
            thresholds = np.full(count, tau)
        elif sigma in found.noisy:
            thresholds = found.noisy[sigma].double().numpy()
        else:
            raise UserError(self._other_rule(sigma))
        return OpensetRule(
            found.prototypes.reshape(-1, dim).double().numpy(),
            np.repeat(np.arange(count), per_class),
            found.antibodies.embeddings.double().numpy(),
            found.weight,
            thresholds,
            found.floor,
        )

    def _other_rule(self, sigma: float) -> str:
        levels = ", ".join(f"{level:g}" for level in self.noise_levels)
        has = f"only for {levels}" if levels else "for none"
        return (
            f"'{self.folder}' has no thresholds for noise of {sigma:g} ({has}): smoothed, it scales the "
            "mean feature to unit length, and certificates are about the mean as it is; run "
            f"`robustvlm immunize ... --sigma {sigma:g}`, or pass --tau T to certify that other rule"
        )

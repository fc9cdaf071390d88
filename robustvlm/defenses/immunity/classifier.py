"""The immunised classifier: a class or "rejected", with the score that decided it; and its folder as a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.certify import OpensetRule
from robustvlm.certify.threats import Noise
from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.immunity.state import AdaptedVLM, Immunity, against, class_scores, load_immunity
from robustvlm.defenses.pipeline import SavedModel
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM

# The immunised classifier: a class or "rejected", with the score that decided it and its threshold


@dataclass(frozen=True)
class Decision:
    """What the model says of one image; `class_name` is None for a rejected one, `nearest` names a class always."""

    class_name: str | None
    nearest: str
    score: float
    threshold: float


class ImmunisedClassifier(Classifier):
    """Logits of the classes, and the open-set score less the threshold of the predicted class as acceptance score.

    logits_k = logit_scale * max_m <z, mu_km> with z the adapted feature; accepted iff the score of `open_set_score`,
    S_DIS or the hinge, is above tau of the class with the largest logit. Differentiable down to the
    pixels. On a smoothed encoder z is the mean of n0 adapted features: where thresholds for its noise are kept, the
    mean as it is, which is the score that certificates are about; otherwise scaled to unit length, with the thresholds
    that were fitted without noise.

    Args:
        encoder: the adapted encoder, perhaps smoothed. immunity: the rest, with the classes in the wanted order.
    """

    prototypes: Tensor
    antibodies: Tensor
    thresholds: Tensor

    def __init__(self, encoder: VLM, immunity: Immunity) -> None:
        super().__init__(
            spec=encoder.spec,
            class_names=immunity.class_names,
            **encoder.framing.options(),
            logit_scale=encoder.logit_scale,
            can_reject=True,
        )
        self.encoder, self.weight, self.floor = encoder, immunity.weight, immunity.floor
        self.antibody_texts = tuple(text.text for text in immunity.antibodies.texts)
        pixels = isinstance(encoder, SmoothedVLM) and encoder.noise.threat.of_pixels
        sigma = encoder.sigma if pixels and isinstance(encoder, SmoothedVLM) else None
        self.smoothed = encoder if isinstance(encoder, SmoothedVLM) and sigma in immunity.noisy else None
        thresholds = immunity.thresholds if sigma is None else immunity.noisy.get(sigma, immunity.thresholds)
        self.register_buffer("prototypes", immunity.prototypes.detach().clone())
        self.register_buffer("antibodies", immunity.antibodies.embeddings.detach().clone())
        self.register_buffer("thresholds", thresholds.detach().clone())
        self.to(encoder.device)
        self.training = False

    @property
    def vlm(self) -> VLM:
        return self.encoder

    @property
    def class_embeddings(self) -> Tensor:
        """Unit class vectors [K, D]: the prototypes; of several of a class their mean direction."""
        return F.normalize(self.prototypes.mean(dim=1), dim=-1)

    @property
    def fingerprint(self) -> str:
        tensors = {"prototypes": self.prototypes, "antibodies": self.antibodies, "thresholds": self.thresholds}
        rule = (repr(self.weight),) if self.floor is None else (repr(self.weight), repr(self.floor))
        return fingerprint(tensors, (self.encoder.fingerprint, *rule, *self.class_names))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the acceptance score, [B, K + 1]."""
        if self.smoothed is not None:
            features = self.smoothed.mean_feature(pixels, self.smoothed.n0)
        else:
            features = self.encoder.encode_image(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.head(features)

    def from_features(self, features: Tensor) -> Tensor | None:
        """Return the output for known features; None on a smoothed encoder, which draws afresh for its answer."""
        return None if isinstance(self.encoder, SmoothedVLM) else self.head(features)

    def head(self, features: Tensor) -> Tensor:
        """Return logits and the acceptance score [B, K + 1] of adapted features [B, D]."""
        z = features.to(self.prototypes.dtype)
        cosines = class_scores(z, self.prototypes)
        leading, predicted = cosines.max(dim=1)
        score = leading - against(z, self.antibodies, self.weight, self.floor)
        acceptance = score - self.thresholds[predicted]
        assert self.logit_scale is not None
        return torch.cat([self.logit_scale * cosines, acceptance[:, None]], dim=1)

    def refusal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score of each image and the threshold of its predicted class, [N] each."""
        thresholds = self.thresholds.to(output)[output[:, :-1].argmax(dim=1)]
        return output[:, -1] + thresholds, thresholds

    @torch.no_grad()
    def decide(self, pixels: Tensor) -> list[Decision]:
        """Return class or rejection, score and threshold of each image [B, 3, H, H].

        Example:
            >>> from robustvlm.defenses.immunity import immunise_without_images
            >>> from robustvlm.models import load_model
            >>> vlm = load_model("tiny")
            >>> made = immunise_without_images(vlm, ["apple", "dog"], ["{}"], ["peach", "wolf"])
            >>> ImmunisedClassifier(vlm, made).decide(torch.rand(1, 3, 64, 64))[0].threshold
            0.0
        """
        output = self(pixels)
        found = []
        for row, acceptance in zip(output[:, :-1], output[:, -1].tolist(), strict=True):
            k = int(row.argmax())
            name, threshold = self.class_names[k], float(self.thresholds[k])
            found.append(Decision(name if acceptance > 0 else None, name, acceptance + threshold, threshold))
        return found


# A folder of kind `immunize` as a model: the base model's encoder, its adapter, and a head that may refuse


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
            from robustvlm.defenses.immunity.votes import OpenVotes  # which stands on this module

            return OpenVotes(encoder, immunity, str(self.folder))
        return ImmunisedClassifier(encoder, immunity)

    def require_votes(self, noise: Noise) -> None:
        from robustvlm.defenses.immunity.votes import at_copies  # as above

        at_copies(self.immunity, noise, str(self.folder))

    def voting(self, encoder: VLM, class_names: Sequence[str], noise: Noise) -> VLM:
        from robustvlm.defenses.immunity.votes import voting  # as above

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

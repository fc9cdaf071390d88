"""The immunised classifier: a class or "rejected", with the score that decided it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.object_graph import fingerprint
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.immunity.state import Immunity, against, class_scores
from robustvlm.defenses.smoothing import SmoothedVLM
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

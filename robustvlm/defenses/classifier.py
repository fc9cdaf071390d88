"""What attacks and evaluations need of a model: pixels in, logits out, perhaps with the right to refuse."""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.attacks.tensors import as_images
from robustvlm.core.boundary import borrowed
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.core.size import Size
from robustvlm.defenses.smoothing import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.models import VLM, ZeroShotClassifier
from robustvlm.models.vlm import framing_of_model

# What attacks and evaluations need of a model: pixels in, logits out, perhaps with the right to refuse


@dataclass(frozen=True, eq=False)
class Answers:
    """What a classifier says of images, one entry for each.

    Attributes:
        classes: places in the class names, -1 where the image is rejected or the answer withheld; int64 [N].
        names: class names, None in those places.
        scores: of a model that may refuse, its acceptance score, positive exactly where the image is accepted; of
            others the softmax probability of the leading class; [N].
        rejected: the model refuses the image, as none of its classes; bool [N].
        abstained: a smoothed model's draws do not decide the class at the level asked for; bool [N].
        output: logits, and of a model that may refuse the acceptance score behind them; [N, K] or [N, K + 1].
    """

    classes: Tensor
    names: tuple[str | None, ...]
    scores: Tensor
    rejected: Tensor
    abstained: Tensor
    output: Tensor = field(repr=False)


class Classifier(nn.Module, ABC):
    """A model of known classes: pixels [B, 3, H, H] in [0, 1] to logits [B, K]; [B, 3, H, W] where it is not square.

    With `can_reject` there is one column more, the acceptance score: an image is accepted exactly when it is positive.
    Where it `abstains` too, what is not accepted is no refusal of the image: its copies do not decide the class.
    `framing` says how an image of any shape is brought there.
    `vlm` and `class_embeddings` are there for classifiers on top of an encoder, None otherwise; `logit_scale` is the
    factor on cosine similarities, None where the logits are none.
    """

    def __init__(
        self,
        *,
        spec: str,
        class_names: Sequence[str],
        image_size: Size,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int = 0,
        short_side: Size = 0,
        logit_scale: float | None = None,
        can_reject: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.class_names = spec, tuple(class_names)
        self.framing = framing_of_model(spec, image_size, interpolation, resize_mode, fill_color, short_side)
        self.logit_scale, self.can_reject = logit_scale, can_reject

    abstains: bool = False
    withholds: bool = False
    """It gives no answer where its noisy copies do not decide one, at an alpha of its own."""

    def undecided(self, output: Tensor) -> Tensor | None:
        """Return where an output [N, K + 1] is no decision of the copies; None unless it tells that from a refusal."""
        del output
        return None

    @property
    def image_size(self) -> Size:
        """Side of the square that the model sees, or (height, width)."""
        return self.framing.image_size

    @property
    def interpolation(self) -> str:
        """Filter of every resize."""
        return self.framing.interpolation

    @property
    def vlm(self) -> VLM | None:
        """The encoder below, if there is one."""
        return None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was taken for granted of the model and could not be checked, beside what its encoder says."""
        return ()

    @property
    def says(self) -> str | None:
        """How an answer comes about, in words, of a model that withholds some; None: as usual."""
        return None

    @property
    def class_embeddings(self) -> Tensor | None:
        """Unit text embeddings of the classes [K, D], if there are any."""
        return None

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        if self.vlm is not None:
            return self.vlm.device
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all that decides the output."""

    def from_features(self, features: Tensor) -> Tensor | None:
        """Return the output for images whose features [B, D], as `vlm.encode_image` gives them, are known.

        To the bit that of `forward`, which would encode them once more; None where more than features decides it.
        """
        del features
        return None

    def refusal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return score and threshold [N] by which images with this `output` [N, K + 1] are accepted: score > threshold.

        The acceptance score is their difference or a growing function of it, so that both are in the model's own terms.
        """
        return output[:, -1], torch.zeros_like(output[:, -1])

    @torch.no_grad()
    def predict(self, images: Tensor, *, alpha: float | None = None, lanes: int = 64) -> Answers:
        """Return what the model says of images [N, 3, H, W] in [0, 1]: class, rejected or abstained, with the score.

        Args:
            alpha: for a smoothed encoder without refusal: withhold the answer unless its draws decide it at this level
                (`robustvlm.certify.predict`). lanes: images in a batch.

        Raises:
            UserError: images that do not fit, or an alpha for a model that does not abstain.

        Example:
            >>> from robustvlm.models import load_model, zero_shot
            >>> classifier = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
            >>> classifier.predict(torch.rand(2, 3, 64, 64)).rejected
            tensor([False, False])
        """
        pixels = as_images(images).to(self.device, torch.float32)
        smoothed, text = self.vlm, self.class_embeddings
        if alpha is not None and (self.can_reject or not isinstance(smoothed, SmoothedVLM) or text is None):
            own = f"'{self.spec}' abstains at an alpha of its own: leave out alpha"
            raise UserError(
                own
                if self.withholds
                else f"'{self.spec}' does not abstain: leave out alpha, or pass a smoothed encoder without refusal, as "
                "load_classifier('tiny+smooth:0.25', ...)"
            )
        if alpha is not None:
            from robustvlm.certify import predict as vote  # certificates' mathematics, which attacks do without
        outputs, decided = [], []
        with borrowed(self), full_precision_kernels():
            for batch in pixels.split(lanes):
                if alpha is None or not isinstance(smoothed, SmoothedVLM) or text is None:
                    outputs.append(self(batch).float().cpu())
                    continue
                # The same draws decide and give the scores: others might name another class.
                draws = smoothed.noisy_features(batch, smoothed.n0)
                unit = F.normalize(draws.mean(dim=1), dim=-1).to(text.dtype)
                outputs.append((smoothed.logit_scale * unit @ text.T).float().cpu())
                table = text.double().cpu().numpy()
                decided += [vote(rows, table, alpha) for rows in draws.double().cpu().numpy()]
        output = torch.cat(outputs)
        logits = output[:, :-1] if self.can_reject else output
        classes = logits.argmax(1)
        # Not "<= 0": a score that is no number accepts nothing.
        refused = ~(output[:, -1] > 0) if self.can_reject else torch.zeros(len(output), dtype=torch.bool)
        nothing = torch.zeros_like(refused)
        rejected, abstained = (nothing, refused) if self.abstains else (refused, nothing)
        if alpha is not None:
            abstained = torch.tensor([label is None for label in decided])
            classes = torch.tensor([0 if label is None else label for label in decided])
        classes = torch.where(rejected | abstained, torch.full_like(classes, -1), classes)
        return Answers(
            classes,
            tuple(None if label < 0 else self.class_names[label] for label in classes.tolist()),
            output[:, -1] if self.can_reject else logits.softmax(1).amax(1),
            rejected,
            abstained,
            output,
        )


class ZeroShot(Classifier):
    """The zero-shot classifier of an encoder, seen as any other classifier.

    Example:
        >>> from robustvlm.models import load_model, zero_shot
        >>> classifier = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> classifier(torch.rand(1, 3, 64, 64)).shape, classifier.can_reject
        (torch.Size([1, 2]), False)
    """

    def __init__(self, head: ZeroShotClassifier) -> None:
        encoder = head.vlm
        super().__init__(
            spec=encoder.spec,
            class_names=head.class_names,
            logit_scale=encoder.logit_scale,
            **encoder.framing.options(),
        )
        self.head = head

    @property
    def vlm(self) -> VLM:
        return self.head.vlm

    @property
    def class_embeddings(self) -> Tensor:
        return self.head.class_embeddings

    @property
    def fingerprint(self) -> str:
        return self.head.vlm.fingerprint

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        return self.head(pixels)


# Refusal: a classifier that rejects what it is not sure of


class Refusing(Classifier):
    """A classifier that rejects what it is not sure of: accepted iff the largest softmax probability exceeds T.

    Maximum concept matching, Ming et al. 2022 (arXiv 2211.13445), at the model's own temperature. The acceptance score
    is logit(p) - logit(T) for the largest probability p, computed as the leading logit less the log-sum-exp of the
    others: it has the sign of p - T, and, unlike p, a gradient also where p is 1 up to rounding.

    Example:
        >>> from robustvlm.defenses.classifier import ZeroShot
        >>> from robustvlm.models import load_model, zero_shot
        >>> inner = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> Refusing(inner, 0.9)(torch.rand(5, 3, 64, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: Classifier, threshold: float) -> None:
        super().__init__(
            spec=f"{inner.spec}+reject:{threshold:g}",
            class_names=inner.class_names,
            logit_scale=inner.logit_scale,
            can_reject=True,
            **inner.framing.options(),
        )
        self.inner, self.threshold = inner, threshold

    @property
    def vlm(self) -> VLM | None:
        return self.inner.vlm

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was taken for granted of the model and could not be checked, beside what its encoder says."""
        return ()

    @property
    def class_embeddings(self) -> Tensor | None:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        text = f"{self.inner.fingerprint} reject {self.threshold!r}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def refusal(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest softmax probability of each image and T, [N] each, in float64."""
        odds = output[:, -1].double() + math.log(self.threshold / (1 - self.threshold))
        return odds.sigmoid(), torch.full_like(odds, self.threshold)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits and the acceptance score, [B, K + 1]."""
        logits = self.inner(pixels)
        return torch.cat([logits, acceptance(logits, self.threshold)[:, None]], dim=1)


def acceptance(logits: Tensor, threshold: float) -> Tensor:
    """Return log-odds of the largest softmax probability less the log-odds of `threshold`, [B, K] -> [B].

    Example:
        >>> acceptance(torch.tensor([0.6, 0.3, 0.1]).log()[None], 0.6).abs() < 1e-6
        tensor([True])
    """
    leading, index = logits.max(dim=1)
    others = logits.scatter(1, index[:, None], float("-inf")).logsumexp(dim=1)
    return leading - others - math.log(threshold / (1 - threshold))

"""What attacks and evaluations need of a model: pixels in, logits out, perhaps with the right to refuse."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.defenses.pipeline import Operation, load_pipeline, split_spec
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM, ZeroShotClassifier, resize, resolve_device, zero_shot
from robustvlm.models.custom import create, source_of, state_of, wrap_encoder
from robustvlm.models.fingerprint import fingerprint
from robustvlm.models.hub import brief
from robustvlm.models.vlm import INTERPOLATIONS
from robustvlm.models.zoo import names_a_callable


class Classifier(nn.Module, ABC):
    """A model of known classes: pixels [B, 3, H, H] in [0, 1] to logits [B, K].

    With `can_reject` there is one column more, the acceptance score: an image is accepted exactly when it is positive.
    `vlm` and `class_embeddings` are there for classifiers on top of an encoder, None otherwise; `logit_scale` is the
    factor on cosine similarities, None where the logits are none.
    """

    def __init__(
        self,
        *,
        spec: str,
        class_names: Sequence[str],
        image_size: int,
        interpolation: str = "bicubic",
        logit_scale: float | None = None,
        can_reject: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.class_names = spec, tuple(class_names)
        self.image_size, self.interpolation = image_size, interpolation
        self.logit_scale, self.can_reject = logit_scale, can_reject

    @property
    def vlm(self) -> VLM | None:
        """The encoder below, if there is one."""
        return None

    @property
    def class_embeddings(self) -> Tensor | None:
        """Unit text embeddings of the classes [K, D], if there are any."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of all that decides the output."""


class ZeroShot(Classifier):
    """The zero-shot classifier of an encoder, seen as any other classifier.

    Example:
        >>> from robustvlm.models import load_model
        >>> classifier = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> classifier(torch.rand(1, 3, 64, 64)).shape, classifier.can_reject
        (torch.Size([1, 2]), False)
    """

    def __init__(self, head: ZeroShotClassifier) -> None:
        encoder = head.vlm
        super().__init__(
            spec=encoder.spec,
            class_names=head.class_names,
            image_size=encoder.image_size,
            interpolation=encoder.interpolation,
            logit_scale=encoder.logit_scale,
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


class OwnClassifier(Classifier):
    """A user's own classifier; see `load_classifier` for what it has to have."""

    def __init__(self, model: Any, *, spec: str, class_names: Sequence[str]) -> None:
        super().__init__(
            spec=spec,
            class_names=class_names,
            image_size=model.image_size,
            interpolation=getattr(model, "interpolation", "bicubic"),
            can_reject=bool(getattr(model, "can_reject", False)),
        )
        self.model = model
        # A plain object is no part that `modules()` visits, so its declaration is repeated here.
        self.differentiable = isinstance(model, nn.Module) or getattr(model, "differentiable", True)
        self.surrogate = None if isinstance(model, nn.Module) else getattr(model, "surrogate", None)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K], or [B, K + 1] with the acceptance score last."""
        pixels = resize(pixels, self.image_size, self.interpolation)
        return self.model(pixels) if callable(self.model) else self.model.forward(pixels)

    @property
    def fingerprint(self) -> str:
        extra = (self.spec, *source_of(self.model), str(self.image_size), self.interpolation)
        return fingerprint(state_of(self.model), extra)


class Refusing(Classifier):
    """A classifier that rejects what it is not sure of: accepted iff the largest softmax probability exceeds T.

    Maximum concept matching, Ming et al. 2022 (arXiv 2211.13445), at the model's own temperature. The acceptance score
    is logit(p) - logit(T) for the largest probability p, computed as the leading logit less the log-sum-exp of the
    others: it has the sign of p - T, and, unlike p, a gradient also where p is 1 up to rounding.

    Example:
        >>> from robustvlm.models import load_model
        >>> inner = ZeroShot(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False))
        >>> Refusing(inner, 0.9)(torch.rand(5, 3, 64, 64)).shape
        torch.Size([5, 3])
    """

    def __init__(self, inner: Classifier, threshold: float) -> None:
        super().__init__(
            spec=f"{inner.spec}+reject:{threshold:g}",
            class_names=inner.class_names,
            image_size=inner.image_size,
            interpolation=inner.interpolation,
            logit_scale=inner.logit_scale,
            can_reject=True,
        )
        self.inner, self.threshold = inner, threshold

    @property
    def vlm(self) -> VLM | None:
        return self.inner.vlm

    @property
    def class_embeddings(self) -> Tensor | None:
        return self.inner.class_embeddings

    @property
    def fingerprint(self) -> str:
        text = f"{self.inner.fingerprint} reject {self.threshold!r}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

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


def load_classifier(
    spec: str,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    cache: bool = True,
) -> Classifier:
    """Return the classifier that `spec` names over the given classes, frozen, in evaluation mode, on `device`.

    A spec is any of `load_pipeline`, read as a zero-shot classifier; or `module:callable` whose object has no
    `encode_text` but classifies: called with pixels [B, 3, S, S] in [0, 1] it returns logits [B, K], and it has an
    `image_size` S. Optional attributes: `can_reject` (the output has the acceptance score as one column more),
    `interpolation`, `differentiable`, `surrogate`. Either may end in `+reject:T`.

    Raises:
        UserError: no such model, wrong operators, or an output that does not fit the classes.

    Example:
        >>> load_classifier("tiny+reject:0.5", ["apple", "dog"], ["{}"], cache=False).can_reject
        True
    """
    place = resolve_device(device)
    base, threshold = _split_rejection(spec)
    inner = _load(base, class_names, templates, place, cache)
    if threshold is None:
        return inner
    if inner.can_reject:
        raise UserError(f"'{base}' refuses images by itself already: leave out +reject:{threshold:g}")
    return Refusing(inner, threshold).eval()


def _split_rejection(spec: str) -> tuple[str, float | None]:
    base, operations = split_spec(spec)
    if not any(operation.name == "reject" for operation in operations):
        return spec, None
    *before, last = operations
    if last.name != "reject" or any(operation.name == "reject" for operation in before):
        raise UserError(f"'+reject:T' must be the last operator of '{spec}' and stand there once")
    return "+".join([base, *map(str, before)]), _threshold(last)


def _threshold(operation: Operation) -> float:
    try:
        (text,) = operation.arguments
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"'+{operation}' must be written +reject:T with a probability 0 < T < 1, as +reject:0.5")
    return value


def _load(
    spec: str, class_names: Sequence[str], templates: Sequence[str], place: torch.device, cache: bool
) -> Classifier:
    if not names_a_callable(spec) or os.path.isdir(spec):
        vlm = load_pipeline(spec, device=place)
    else:
        thing = create(spec)
        if not hasattr(thing, "encode_text") and not hasattr(thing, "encode_image"):
            return _own(thing, spec, class_names, place)
        vlm = wrap_encoder(thing, spec, place)
    return ZeroShot(zero_shot(vlm, class_names, templates, cache=cache)).eval()


def _own(model: Any, spec: str, class_names: Sequence[str], place: torch.device) -> OwnClassifier:
    if not callable(model) and not callable(getattr(model, "forward", None)):
        raise UserError(
            f"'{spec}' must return an encoder (encode_image, encode_text, image_size, logit_scale) or a classifier "
            f"(callable, image_size): {type(model).__name__} is neither"
        )
    size, how = getattr(model, "image_size", None), getattr(model, "interpolation", "bicubic")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"'{spec}': image_size must be a positive whole number (images are square), got {size!r}")
    if how not in INTERPOLATIONS:
        raise UserError(f"'{spec}' asks for the unknown interpolation '{how}'; {nearest(str(how), INTERPOLATIONS)}")
    if not isinstance(model, nn.Module) and callable(getattr(model, "to", None)):
        model = model.to(place) or model
    classifier = OwnClassifier(model, spec=spec, class_names=class_names)
    classifier.to(place)
    _try_out(classifier, place)
    return classifier


def _try_out(classifier: OwnClassifier, place: torch.device) -> None:
    """Classify two images, and see whether the output fits the classes."""
    size, wanted = classifier.image_size, len(classifier.class_names) + classifier.can_reject
    pixels = torch.linspace(0, 1, 2 * 3 * size**2, device=place).view(2, 3, size, size)
    must = f"'{classifier.spec}' must return finite logits [2, {wanted}] for 2 images and {len(classifier.class_names)}"
    must += " classes and one acceptance score" if classifier.can_reject else " classes"
    try:
        with torch.no_grad():
            output = classifier(pixels)
    except Exception as error:  # the user's classifier may fail in any way
        raise UserError(f"{must}, it raised {type(error).__name__}: {brief(error)}") from error
    if not isinstance(output, Tensor):
        raise UserError(f"{must}, got a {type(output).__name__}")
    if output.shape != (2, wanted) or not output.is_floating_point():
        advice = "" if output.ndim != 2 else ": pass data with the classes that it was made for"
        raise UserError(f"{must}, got {output.dtype} {list(output.shape)}{advice}")
    if not output.isfinite().all():
        raise UserError(f"{must}, got NaN or infinite values")

"""The contract of a detection score: features in, one number per image out, higher = more in-distribution."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from robustvlm.attacks.tensors import as_images, own_device
from robustvlm.core.boundary import borrowed
from robustvlm.core.framing import to_pixels
from robustvlm.core.seeds import full_precision_kernels
from robustvlm.data.source import DataSource, Sample
from robustvlm.errors import UserError

# Scores of images: an encoder and a detector as one module, fitted and asked with pixels or with features

_LANES = 64

Batches = Tensor | DataSource | Iterable[tuple[Tensor, Tensor]]
"""Images [N, C, H, W] or features [N, D], batches of them with labels (as a loader yields them), or a data source."""


class ImageDetector(nn.Module):
    """A score of images: pixels [B, 3, H, H] in [0, 1] to one number each [B], higher = more in-distribution.

    Args:
        model: an encoder; a classifier, whose encoder is taken, or its logits where it has none; or any module from
            pixels to features [B, D]. It is used in evaluation mode by `fit` and `predict`, and left as it was.
        detector: the score; one that learns is fitted by `fit`.

    Example:
        >>> from robustvlm.detect import MCM, head_of
        >>> from robustvlm.models import load_model, zero_shot
        >>> classifier = zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False)
        >>> score = ImageDetector(classifier.vlm, MCM(head_of(classifier)))
        >>> score(torch.rand(3, 3, 64, 64)).shape
        torch.Size([3])
    """

    def __init__(self, model: Callable[..., Any], detector: Detector) -> None:
        super().__init__()
        encoder = getattr(model, "vlm", None)
        self.model, self.detector = model if encoder is None else encoder, detector
        self._logits = -1 if encoder is None and getattr(model, "can_reject", False) else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores [B]; differentiable in the pixels."""
        return self.detector.score(self._features(pixels))

    def fit(self, data: Batches, labels: Tensor | None = None) -> ImageDetector:
        """Return this with its score fitted to images of known classes; see `FittedDetector.fit`."""
        fit_features = getattr(self.detector, "fit_features", None)
        if fit_features is None:
            raise UserError(f"{type(self.detector).__name__} learns nothing from images: ask it with predict")
        return ImageDetector(self.model, fit_features(*gathered(data, labels, self)))

    def predict(self, images: Tensor) -> Tensor:
        """Return scores [N] of images [N, C, H, W], or of features [N, D]; no gradient, on the CPU."""
        return self.detector.predict(images if images.ndim == 2 else self.features(images)).cpu()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images [N, C, H, W] in [0, 1], batch by batch, on the CPU."""
        pixels, place = as_images(images).float(), own_device(self.model, images)
        with borrowed(self), full_precision_kernels():
            return torch.cat([self._features(batch.to(place)).float().cpu() for batch in pixels.split(_LANES)])

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model(pixels)
        return features[:, : self._logits]


def gathered(data: Batches, labels: Tensor | None, by: ImageDetector | None) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and labels [N] of whatever holds them; images go through `by`, where there is one.

    Raises:
        UserError: images without a model, or no labels.
    """
    if isinstance(data, Tensor):
        if labels is None:
            raise UserError("labels are missing: pass fit(features, labels), or batches of both")
        return _featured(data, by), torch.as_tensor(labels).cpu()
    batches = _batches(data, by) if isinstance(data, DataSource) else data
    pairs = [(_featured(x, by), torch.as_tensor(y).cpu()) for x, y in batches]
    if not pairs:
        raise UserError("there is no image to learn from: pass batches of (images, labels)")
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _featured(data: Tensor, by: ImageDetector | None) -> Tensor:
    if data.ndim == 2:
        return data
    if by is None:
        raise UserError(f"fit takes features [N, D], got {list(data.shape)}: pass model=... to learn from images")
    return by.features(data)


def _batches(source: DataSource, by: ImageDetector | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the readable images of known classes of a source, as the model takes them."""
    framing = getattr(None if by is None else by.model, "framing", None)
    if framing is None:
        raise UserError("data is read at the size of an encoder: pass model=load_model(...), or batches of images")
    held: list[Sample] = []
    for item in source.samples():
        if isinstance(item, Sample) and item.label >= 0:
            held.append(item)
        if len(held) == _LANES:
            yield _stacked(held, framing)
            held = []
    if held:
        yield _stacked(held, framing)


def _stacked(held: list[Sample], framing: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([to_pixels(one.image, framing) for one in held]), torch.tensor([one.label for one in held])


# The contract of a detection score: features in, one number per image out, higher = more in-distribution

Own = TypeVar("Own", bound="Detector")
Fitted = TypeVar("Fitted", bound="FittedDetector")
T = TypeVar("T")


class NotFitted(UserError):
    """A score that learns from images of known classes was asked before it saw any.

    Example:
        >>> str(NotFitted("KNN"))
        'KNN has seen no images yet: call fit(features, labels) first and use what it returns'
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has seen no images yet: call fit(features, labels) first and use what it returns")


@dataclass(frozen=True, eq=False)
class Head:
    """The zero-shot head of an encoder: unit text embeddings [K, D] of the known classes, and the factor on cosines.

    Example:
        >>> Head(torch.eye(2), 10.0).logits(torch.tensor([[0.6, 0.8]]))
        tensor([[6., 8.]])
    """

    class_embeddings: Tensor
    logit_scale: float

    def __post_init__(self) -> None:
        shape = tuple(self.class_embeddings.shape)
        if len(shape) != 2 or shape[0] < 2:
            raise UserError(f"class embeddings must have the shape [classes >= 2, D], got {list(shape)}")
        if not self.logit_scale > 0:
            raise UserError(f"logit_scale must be positive, got {self.logit_scale}: CLIP's is about 100")

    @classmethod
    def of_logits(cls, n_classes: int) -> Head:
        """Return the head of a model without an encoder: its logits [N, K] take the place of features, unchanged."""
        return cls(torch.eye(n_classes), 1.0)

    def cosines(self, features: Tensor) -> Tensor:
        """Return cosines [N, K] of unit features [N, D] to the classes."""
        texts = self.class_embeddings.to(features)
        if features.shape[-1] != texts.shape[1]:
            raise UserError(f"features have {features.shape[-1]} dimensions, the class embeddings {texts.shape[1]}")
        return features @ texts.T

    def logits(self, features: Tensor) -> Tensor:
        """Return zero-shot logits [N, K] of unit features [N, D]."""
        return self.logit_scale * self.cosines(features)


@dataclass(frozen=True, eq=False)
class PrototypeHead(Head):
    """A head with several unit prototypes [K, M, D] of each class, the nearest of which counts.

    `class_embeddings` are what stands for a class where one vector has to.

    Example:
        >>> both = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]] * 2])
        >>> head = PrototypeHead(torch.nn.functional.normalize(both.mean(dim=1), dim=1), 10.0, both)
        >>> head.logits(torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([[10.,  0.]])
    """

    prototypes: Tensor

    def cosines(self, features: Tensor) -> Tensor:
        """Return cosines [N, K] of unit features [N, D] to the nearest prototype of each class."""
        return torch.einsum("nd,kmd->nkm", features, self.prototypes.to(features)).amax(dim=2)


def prototypes_of(classifier: Any) -> Tensor | None:
    """Return the prototypes [K, M, D] that decide for an immunised model, whose copies may vote; None of others."""
    found = getattr(getattr(classifier, "judge", classifier), "prototypes", None)
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


def head_of(classifier: Any) -> Head:
    """Return the head of a classifier as scores want it: its class embeddings, or its logits where it has none.

    Of several prototypes a class the nearest counts, as for the classifier.

    Example:
        >>> from robustvlm.models import load_model, zero_shot
        >>> head_of(zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False)).class_embeddings.shape
        torch.Size([2, 192])
    """
    embeddings = getattr(classifier, "class_embeddings", None)
    if embeddings is None:
        return Head.of_logits(len(classifier.class_names))
    scale = getattr(classifier, "logit_scale", None)
    scale = classifier.vlm.logit_scale if scale is None else scale
    prototypes = prototypes_of(classifier)
    if prototypes is None or prototypes.shape[1] == 1:
        return Head(embeddings, scale)
    return PrototypeHead(embeddings, scale, prototypes)


class Detector(ABC):
    """A score of unit image features [N, D]. The one sign rule: the higher, the more in-distribution.

    Detectors are frozen: their fields are settings and, where they learn from images, what was learnt. Scores are
    differentiable in the features (almost everywhere), so that they can be attacked.
    """

    @abstractmethod
    def score(self, features: Tensor) -> Tensor:
        """Return one number per image, [N, D] -> [N]; higher = more in-distribution."""

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return scores [N] of unit features [N, D], without a gradient; for images, bind a model with `on`.

        Raises:
            UserError: images instead of features.
        """
        if features.ndim != 2:
            raise UserError(
                f"{type(self).__name__} knows no model, so it takes features [N, D], got {list(features.shape)}: "
                "pass model=... to fit, or take on(model)"
            )
        return self.score(features)

    def on(self, model: Callable[..., Any]) -> ImageDetector:
        """Return the score of images: this one behind an encoder, or behind the encoder of a classifier.

        Example:
            >>> from robustvlm.detect import MCM
            >>> from robustvlm.models import load_model, zero_shot
            >>> classifier = zero_shot(load_model("tiny"), ["apple", "dog"], ["{}"], cache=False)
            >>> MCM(head_of(classifier)).on(classifier).predict(torch.rand(2, 3, 64, 64)).shape
            torch.Size([2])
        """
        return ImageDetector(model, self)

    def state(self) -> dict[str, object]:
        """Return settings and learnt tensors by name: all that decides the score."""
        return dict(_flat(self))

    def to(self: Own, device: torch.device | str) -> Own:
        """Return the detector with its tensors on a device, so that scores there need no copies."""
        return _moved(self, device)


class FittedDetector(Detector):
    """A score that learns from images of known classes; it is made empty, and `fit_features` returns the ready one."""

    @abstractmethod
    def fit_features(self: Fitted, features: Tensor, labels: Tensor) -> Fitted:
        """Return the detector fitted to unit features [N, D] of images with labels [N] (int64, no unknown ones)."""

    @overload
    def fit(self: Fitted, data: Batches, labels: Tensor | None = None, *, model: None = None) -> Fitted: ...

    @overload
    def fit(self, data: Batches, labels: Tensor | None = None, *, model: Callable[..., Any]) -> ImageDetector: ...

    def fit(
        self: Fitted, data: Batches, labels: Tensor | None = None, *, model: Callable[..., Any] | None = None
    ) -> Fitted | ImageDetector:
        """Return the score fitted to known images; with `model` one of images, without one of features.

        Args:
            data: features [N, D], or images [N, C, H, W] for `model`; batches of either with labels, as a loader yields
                them; or a data source, read as `model` takes images.
            labels: classes [N], where `data` is a tensor.
            model: an encoder or a classifier, as `ImageDetector` takes them.

        Example:
            >>> from robustvlm.detect import KNN
            >>> KNN(k=1).fit(torch.eye(2), torch.tensor([0, 1])).predict(torch.tensor([[0.6, 0.8]]))
            tensor([-0.6325])
        """
        if model is not None:
            return ImageDetector(model, self).fit(data, labels)
        return self.fit_features(*gathered(data, labels, None))

    def learnt(self, value: T | None) -> T:
        """Return what `fit_features` has put into a field, or raise NotFitted."""
        if value is None:
            raise NotFitted(type(self).__name__)
        return value


def check_known(features: Tensor, labels: Tensor) -> None:
    """Refuse features and labels that nothing can be learnt from.

    Raises:
        UserError: wrong shapes or types, no image, values that are not finite, labels below 0.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise UserError(f"features must be floats [N, D], got {features.dtype} {list(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise UserError(f"labels must be whole numbers [{len(features)}], got {labels.dtype} {list(labels.shape)}")
    if not len(features):
        raise UserError("there is no image to learn from: pass features of at least one")
    if not features.isfinite().all():
        raise UserError("features hold NaN or infinite values: leave those images out")
    if int(labels.min()) < 0:
        raise UserError("labels below 0 stand for unknown classes: learn from images of known classes only")


def require_temperature(value: float) -> None:
    """Refuse a temperature that nothing can be divided by."""
    if not 0 < value < math.inf:
        raise UserError(f"the temperature must be positive, got {value}: pass for example 1")


def confidence(logits: Tensor) -> Tensor:
    """Return the log-odds of the largest softmax probability, [N, K] -> [N].

    A monotone map of that probability, log p - log(1 - p), which neither rounds to a tie nor loses its gradient where
    p is 1 up to rounding. `torch.sigmoid` gives p back.

    Example:
        >>> confidence(torch.tensor([[0.7, 0.2, 0.1]]).log()).sigmoid()
        tensor([0.7000])
    """
    leading, index = logits.max(dim=1)
    return leading - logits.scatter(1, index[:, None], float("-inf")).logsumexp(dim=1)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the fields of a dataclass, those of its parts under dotted names."""
    if not dataclasses.is_dataclass(value):
        yield prefix, value
        return
    yield f"{prefix}()", type(value).__name__
    for field in dataclasses.fields(value):
        yield from _flat(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)


def _moved(value: T, device: torch.device | str) -> T:
    """Return a tensor, or a dataclass with all tensors in it, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)  # type: ignore[return-value]  # a tensor, as T is here
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    parts = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **parts)

"""A defence put in front of a model, an encoder or classifier like any other; gradient modes; passes counted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.attacks.honesty import exactly
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import Size
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.zoo.base import AnswerDefence, Defence, FeatureDefence, Passes, PixelDefence
from robustvlm.defenses.zoo.gradients import within_own_steps
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.vlm import check_pixels, fitted, unit_features


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def laid_as(given: Tensor, pixels: Tensor) -> Tensor:
    """Return pixels channels last where the given images are: the layout that whoever asks chose for the model.

    Views and steps of a defence leave them in any layout, and the other one costs a quarter of a convolution's speed.
    Where images come channels first nothing is moved: a defence that does nothing is the undefended model to the bit.

    Example:
        >>> given = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> laid_as(given, torch.rand(8, 3, 4, 4)).stride(1), laid_as(given.contiguous(), given).stride(1)
        (1, 1)
    """
    if given.is_contiguous() or not given.is_contiguous(memory_format=torch.channels_last):
        return pixels
    return pixels.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class _BelowModel:
    """A model as a defence of given images asks it: an encoder, or a classifier of known classes, maybe with one."""

    model: VLM | Classifier
    given: Tensor

    @property
    def _vlm(self) -> VLM:
        found = self.model if isinstance(self.model, VLM) else self.model.vlm
        if found is None:
            raise UserError(f"'{self.model.spec}' is a classifier without an encoder")
        return found

    @property
    def _classifier(self) -> Classifier:
        if isinstance(self.model, VLM):
            raise UserError(f"'{self.model.spec}' is an encoder, which knows no classes")
        return self.model

    @property
    def size(self) -> Size:
        return self.model.image_size

    @property
    def logit_scale(self) -> float:
        return 1.0 if self.model.logit_scale is None else self.model.logit_scale

    @property
    def classes(self) -> Tensor:
        found = self._classifier.class_embeddings
        if found is None:
            raise UserError(f"'{self.model.spec}' is a classifier without class embeddings")
        return _wide(found)

    def embed(self, pixels: Tensor) -> Tensor:
        return _wide(self._vlm.embed_image(laid_as(self.given, pixels)))

    def encode(self, pixels: Tensor) -> Tensor:
        return _wide(self._vlm.encode_image(laid_as(self.given, pixels)))

    def encode_text(self, texts: list[str]) -> Tensor:
        return _wide(self._vlm.encode_text(texts))

    def logits(self, pixels: Tensor) -> Tensor:
        return _wide(self._classifier(laid_as(self.given, pixels)))

    def scores(self, features: Tensor) -> Tensor:
        # Under autocast the last product would lose the margins attacks turn on.
        with torch.autocast(features.device.type, enabled=False):
            return self.logit_scale * F.normalize(_wide(features), dim=-1) @ self.classes.T


class _Mode:
    """What the two kinds of defended models share: the defence and the gradient mode it is in."""

    defence: Defence
    mode: str

    @property
    def mode_in_force(self) -> str:
        """The gradient mode, which is the first one while a defence in front takes steps of its own."""
        return self.defence.modes[0] if within_own_steps() else self.mode

    @property
    def random_draws(self) -> int:
        """How many draws a gradient is to be averaged over; 0 for a defence that does not draw."""
        return self.defence.gradient_draws if self.defence.random else 0

    @property
    def attack_remark(self) -> str:
        """What a single attack cannot say of a test-time defence."""
        return (
            f"+{self.defence} is a test-time defence, and gradients look through it in its mode '{self.mode}' alone. "
            "Points found in another mode, or on the undefended model, may fool it all the same: `robustvlm judge` "
            "tries them all and counts the worst."
        )


def _looked_at(ask: Callable[[Tensor], Tensor], moved: Tensor, seen: Tensor) -> Tensor:
    """Return what a model says of moved pixels, with the gradient of what it says of those that an attack looks at."""
    if seen is moved or not torch.is_grad_enabled():
        return ask(moved)
    with torch.no_grad():
        found = ask(moved)
    with torch.random.fork_rng(devices=[seen.device] if seen.is_cuda else []):  # a base that draws goes on as it would
        return exactly(found, ask(seen))


class DefendedVLM(VLM, _Mode):
    """An encoder behind a pixel or feature defence.

    Example:
        >>> from robustvlm.models import load_model
        >>> from robustvlm.defenses.zoo.base import read_defence
        >>> DefendedVLM(load_model("tiny"), read_defence("bits", ("3",))).encode_image(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 192])
    """

    def __init__(self, base: VLM, defence: PixelDefence | FeatureDefence) -> None:
        super().__init__(
            spec=f"{base.spec}+{defence}",
            logit_scale=base.logit_scale,
            **base.framing.options(),
        )
        self.base, self.defence, self.mode = base, defence, defence.modes[0]
        self.logit_bias = base.logit_bias
        self._anchor = self._anchor.to(base.device)
        self.training = False

    def encode_image(self, pixels: Tensor) -> Tensor:
        if isinstance(self.defence, FeatureDefence):
            return self.embed_image(pixels)  # of unit length already, and scaled again it would not be the same bits
        if isinstance(self.defence, PixelDefence) and torch.is_grad_enabled():
            check_pixels(pixels, self.image_size)
            # What an attack looks at is looked at as a whole, its length included.
            whole = fitted(pixels, self.image_size, self.interpolation)
            return self._looked_at(lambda x: unit_features(self.base.embed_image(x)), whole)
        return super().encode_image(pixels)

    def ask_below(self, ask: Callable[[VLM, Tensor], Tensor], pixels: Tensor) -> Tensor | None:
        check_pixels(pixels, self.image_size)
        whole = fitted(pixels, self.image_size, self.interpolation)
        if isinstance(self.defence, FeatureDefence):
            return ask(self.base, _wide(whole)) if self.defence.idle else None
        return self._looked_at(lambda x: ask(self.base, x), whole)

    def _looked_at(self, ask: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        assert isinstance(self.defence, PixelDefence)
        pixels = _wide(pixels)
        moved, seen = self.defence.seen(pixels, _BelowModel(self.base, pixels), self.mode_in_force)
        return _looked_at(lambda x: ask(laid_as(pixels, x)), moved, seen)

    def _image_features(self, pixels: Tensor) -> Tensor:
        if isinstance(self.defence, PixelDefence):
            return self._looked_at(self.base.embed_image, pixels)
        assert isinstance(self.defence, FeatureDefence)
        return self.defence.feature(_wide(pixels), _BelowModel(self.base, pixels), self.mode_in_force)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.base.embed_text(texts)  # scaled to unit length by the caller: twice is not the same bits

    @property
    def text_fingerprint(self) -> str:
        return self.base.text_fingerprint

    def class_vectors(self, class_names: Sequence[str]) -> Tensor | None:
        return self.base.class_vectors(class_names)

    def cut_tokens(self, texts: Sequence[str]) -> list[int]:
        return self.base.cut_tokens(texts)

    def at_noise(self, sigma: float) -> VLM:
        below = self.base.at_noise(sigma)
        if below is self.base:
            return self
        made = copy.copy(self)
        made._modules = {**self._modules, "base": below}
        made._known_digests = {}
        return made

    @property
    def fingerprint(self) -> str:
        """Digest of the base model and the defence."""
        return fingerprint({}, (self.base.fingerprint, self.defence.identity))


class DefendedClassifier(Classifier, _Mode):
    """A classifier behind a defence; it has no features of its own, so that commands about features refuse it.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> load_classifier("tiny+vote:4", ["apple", "dog"], ["{}"], cache=False)(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 2])
    """

    def __init__(self, inner: Classifier, defence: Defence) -> None:
        if inner.can_reject:
            raise UserError(f"'{inner.spec}' refuses images itself, and +{defence} stands in front of logits only")
        if defence.needs_encoder and inner.vlm is None:
            raise UserError(f"+{defence} needs an encoder, and '{inner.spec}' is a classifier without one")
        super().__init__(
            spec=f"{inner.spec}+{defence}",
            class_names=inner.class_names,
            **inner.framing.options(),
        )
        self.inner, self.defence, self.mode = inner, defence, defence.modes[0]
        self.eval()

    @property
    def fingerprint(self) -> str:
        return fingerprint({}, (self.inner.fingerprint, self.defence.identity))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        pixels = fitted(_wide(pixels), self.image_size, self.interpolation)
        below = _BelowModel(self.inner, pixels)
        # The encoder's own precision is its own business, the defence's arithmetic is float32.
        if isinstance(self.defence, PixelDefence):
            return _looked_at(below.logits, *self.defence.seen(pixels, below, self.mode_in_force))
        if isinstance(self.defence, FeatureDefence):
            return below.scores(self.defence.feature(pixels, below, self.mode_in_force))
        assert isinstance(self.defence, AnswerDefence)
        return self.defence.answer(pixels, below, self.mode_in_force)


# Gradient modes of a model, whichever defences it has


def defended(model: nn.Module) -> list[Any]:
    """Return the parts of a model that are defences in front of something, the outermost first.

    Example:
        >>> from robustvlm.defenses import load_pipeline
        >>> [str(part.defence) for part in defended(load_pipeline("tiny+bits:3+blur:3:1"))]
        ['blur:3:1', 'bits:3']
    """
    return [part for part in model.modules() if isinstance(part, _Mode)]


def modes_of(model: nn.Module) -> tuple[str, ...]:
    """Return the gradient modes that the defences of a model offer, each once."""
    return tuple(dict.fromkeys(mode for part in defended(model) for mode in part.defence.modes))


@contextlib.contextmanager
def gradient_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Let the defences of a model that offer a gradient mode be in it; the others stay in theirs. All are put back.

    What the model returns is the same to the bit in every mode.

    Raises:
        UserError: no defence of the model offers it.
    """
    if mode not in modes_of(model):
        offered = ", ".join(modes_of(model)) or "none"
        raise UserError(f"the model has no gradient mode '{mode}': it offers {offered}")
    parts = [(part, part.mode) for part in defended(model) if mode in part.defence.modes]
    try:
        for part, _ in parts:
            part.mode = mode
        yield
    finally:
        for part, before in parts:
            part.mode = before


# Passes, counted


@dataclass
class Counted:
    """Passes of the innermost model, per image summed over the images."""

    forward: int = 0
    backward: int = 0

    def __deepcopy__(self, memo: object) -> Counted:
        return self

    def per_image(self, images: int) -> Passes:
        """Return the passes of one image of so many."""
        return Passes(self.forward / images, self.backward / images)


@contextlib.contextmanager
def counted_passes(*models: nn.Module) -> Iterator[Counted]:
    """Count the passes through the encoder, or the classifier, that all defences of a model stand on.

    Args:
        models: whose encoders are counted together, one that several share once.

    Example:
        >>> from robustvlm.defenses import load_classifier
        >>> model = load_classifier("tiny+vote:4", ["apple", "dog"], ["{}"], cache=False)
        >>> with torch.no_grad(), counted_passes(model, model) as seen:
        ...     _ = model(torch.rand(2, 3, 64, 64))
        >>> seen.per_image(2).forward
        4.0
    """
    seen = Counted()
    with contextlib.ExitStack() as stack:
        for found in {id(one): one for one in map(_innermost, models)}.values():
            stack.enter_context(_watched(found, seen))
        yield seen


@contextlib.contextmanager
def _watched(model: nn.Module, seen: Counted) -> Iterator[None]:
    name = model.counted_at if isinstance(model, VLM) else "forward"
    own = vars(model).get(name)  # somebody else may be counting, too
    vars(model)[name] = _Counting(getattr(model, name), seen)
    try:
        yield
    finally:
        vars(model).pop(name)
        if own is not None:
            vars(model)[name] = own


@dataclass
class _Counting:
    """What is asked in the place of an encoder's method; a copy of the encoder asks its own and counts with it."""

    ask: Callable[[Tensor], Tensor]
    seen: Counted

    def __call__(self, pixels: Tensor) -> Tensor:
        output = self.ask(pixels)
        self.seen.forward += len(pixels)
        if output.requires_grad:
            output.register_hook(self._noted)
        return output

    def _noted(self, grad: Tensor) -> None:
        self.seen.backward += len(grad)


def _innermost(model: nn.Module) -> nn.Module:
    """Return what an image reaches last: what stands around an encoder names it `base`; texts may have their own."""
    found = next((part for part in model.modules() if isinstance(part, VLM)), None)
    if found is None:
        return [part for part in model.modules() if isinstance(part, Classifier)][-1]
    while isinstance(base := getattr(found, "base", None), VLM):
        found = base
    return found

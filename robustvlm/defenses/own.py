"""The user's own classifier, named `module:callable`: anything from pixels to logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.core.boundary import Boundary, in_own_precision, own_copy
from robustvlm.core.framing import trial_pixels
from robustvlm.core.object_graph import fingerprint
from robustvlm.core.size import size_text
from robustvlm.defenses.classifier import Classifier
from robustvlm.defenses.library import LibraryClassifier, places_of
from robustvlm.errors import UserError, nearest
from robustvlm.models.custom import Hidden, framing_declared, size_declared, source_of, state_of
from robustvlm.models.vlm import INTERPOLATIONS, fitted
from robustvlm.models.weights import brief
from robustvlm.text import one_line


class OwnClassifier(Classifier):
    """A user's own classifier; see `load_classifier` for what it has to have.

    Of one that names its classes the columns are brought into the order of those wanted, and the others left out.

    Raises:
        UserError: a class wanted that it does not name, or an attribute that is none of what it stands for.
    """

    def __init__(self, model: Any, *, spec: str, class_names: Sequence[str]) -> None:
        super().__init__(
            spec=spec,
            class_names=class_names,
            image_size=size_declared(model, spec),
            can_reject=bool(getattr(model, "can_reject", False)),
            **framing_declared(model),
        )
        self.model = model
        self.own_names = names_declared(model, spec)
        self._columns = self._columns_of(class_names)
        self._hidden = Hidden(model)
        call = model if callable(model) else model.forward
        self._ask = Boundary(call, what=f"'{spec}'", parts=model)
        # A plain object is no part that `modules()` visits, so its declaration is repeated here.
        self.differentiable = isinstance(model, nn.Module) or getattr(model, "differentiable", True)
        stand_in = None if isinstance(model, nn.Module) else getattr(model, "surrogate", None)
        self.surrogate = stand_in
        if callable(stand_in) and self._columns is not None:
            self.surrogate = lambda pixels: self._ordered(stand_in(pixels))
        self.eval().requires_grad_(False)

    @property
    def in_half(self) -> bool:
        """Whether logits are computed in half precision."""
        return self._ask.in_half

    def settle(self, pixels: Tensor) -> Tensor:
        """Try the classifier out on pixels of its size, and learn how it has to be asked."""
        return self._ask.settle(pixels)

    @property
    def outputs(self) -> int:
        """How many columns the user's object has to give."""
        return len(self.class_names if self.own_names is None else self.own_names) + self.can_reject

    @property
    def remarks(self) -> tuple[str, ...]:
        """That nothing says which class each output is, where that is so."""
        if self.own_names is not None:
            return ()
        return (
            f"nothing says what the outputs of '{self.spec}' mean: they are taken for the {len(self.class_names)} "
            "classes of the data in their order; if they are others, every figure is wrong, so give it class_names",
        )

    def _columns_of(self, wanted: Sequence[str]) -> list[int] | None:
        """Return which outputs are wanted, in order; None for all of them as they are."""
        if self.own_names is None or self.own_names == tuple(wanted):
            return None
        rejecting = [len(self.own_names)] if self.can_reject else []
        try:
            return places_of(wanted, self.own_names, self.spec) + rejecting
        except UserError as error:
            raise UserError(f"{error}; without class_names its outputs are taken in the data's order") from None

    def _ordered(self, output: Tensor) -> Tensor:
        return output if self._columns is None else output[:, self._columns]

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K], or [B, K + 1] with the acceptance score last; in float32 at least."""
        return self._ordered(self._ask(fitted(pixels, self.image_size, self.interpolation)))

    def _apply(self, fn: Any, recurse: bool = True) -> OwnClassifier:
        # The precision of a user's weights is part of what is evaluated.
        return super()._apply(in_own_precision(fn), recurse)

    @property
    def fingerprint(self) -> str:
        framing = (size_text(self.image_size), self.interpolation, *self.framing.unusual())
        columns = () if self._columns is None else ("columns", *map(str, self._columns))
        extra = (self.spec, *source_of(self.model), *framing, *columns)
        return fingerprint(state_of(self.model) | self._hidden.state(), extra)


class OfLibrary(OwnClassifier):
    """A classifier of timm or torchvision, known by its weights and its name, wherever its file lies."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was taken for granted of it."""
        found: tuple[str, ...] = self.model.remarks
        return found

    @property
    def fingerprint(self) -> str:
        framing = (size_text(self.image_size), self.interpolation, *self.framing.unusual())
        return fingerprint(state_of(self.model), (self.model.identity, *framing))


def names_declared(thing: object, spec: str) -> tuple[str, ...] | None:
    """Return the classes that a user's object names, in the order of its outputs; None where it names none.

    Raises:
        UserError: `class_names` is no list of texts.
    """
    names = getattr(thing, "class_names", None)
    if names is None:
        return None
    found = () if isinstance(names, str) or not isinstance(names, Iterable) else tuple(names)
    if not found or not all(isinstance(name, str) for name in found):
        said = one_line(repr(names))
        raise UserError(f"'{spec}': class_names must be a list of texts, one for each output, got {said}")
    return tuple(str(name) for name in found)


def load_own(model: Any, spec: str, class_names: Sequence[str], place: torch.device) -> OwnClassifier:
    """Return a user's object as a classifier, after a trial on two images; a UserError says what is wrong with it."""
    if not callable(model) and not callable(getattr(model, "forward", None)):
        raise UserError(
            f"'{spec}' must return an encoder (encode_image, encode_text, image_size, logit_scale) or a classifier "
            f"(callable, image_size): {type(model).__name__} has no encode_image and cannot be called"
        )
    size_declared(model, spec)
    how = getattr(model, "interpolation", "bicubic")
    if how not in INTERPOLATIONS:
        raise UserError(f"'{spec}' asks for the unknown interpolation '{how}'; {nearest(str(how), INTERPOLATIONS)}")
    if not isinstance(model, nn.Module) and callable(getattr(model, "to", None)):
        model = model.to(place) or model
    # A caller may go on using what the callable returned.
    kind = OfLibrary if isinstance(model, LibraryClassifier) else OwnClassifier
    classifier = kind(own_copy(model), spec=spec, class_names=class_names)
    classifier.to(place)
    _try_out(classifier, place)
    return classifier


def _try_out(classifier: OwnClassifier, place: torch.device) -> None:
    """Classify two images, and see whether the output fits the classes."""
    size, wanted = classifier.image_size, classifier.outputs
    pixels = trial_pixels(2, size, device=place)
    count = wanted - classifier.can_reject
    must = f"'{classifier.spec}' must return finite logits [2, {wanted}] for 2 images and {count}"
    must += " classes" if classifier.own_names is None else " class_names"
    must += " and one acceptance score" if classifier.can_reject else ""
    try:
        with torch.no_grad():
            output = classifier.settle(pixels)
    except UserError:
        raise
    except Exception as error:  # the user's classifier may fail in any way
        raise UserError(f"{must}, it raised {type(error).__name__}: {brief(error)}") from error
    if output.shape != (2, wanted) or not output.is_floating_point():
        of_data = ": pass data with the classes that it was made for"
        advice = "" if output.ndim != 2 or classifier.own_names is not None else of_data
        raise UserError(f"{must}, got {output.dtype} {list(output.shape)}{advice}")
    if not output.isfinite().all():
        raise UserError(f"{must}, got NaN or infinite values")

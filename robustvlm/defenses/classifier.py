"""From a spec to the classifier that is attacked or evaluated: zero-shot, the user's own, perhaps with refusal."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from robustvlm.core.registry import names_a_callable
from robustvlm.defenses.base import Classifier, ZeroShot
from robustvlm.defenses.own import load_own
from robustvlm.defenses.pipeline import load_pipeline, split_spec
from robustvlm.defenses.refusal import Refusing, split_rejection
from robustvlm.defenses.saved import saved_model
from robustvlm.errors import UserError
from robustvlm.models import resolve_device, zero_shot
from robustvlm.models.custom import create, wrap_encoder


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
    base, threshold = split_rejection(spec)
    inner = _load(base, class_names, templates, place, cache)
    if threshold is None:
        return inner
    if inner.can_reject:
        raise UserError(f"'{base}' refuses images by itself already: leave out +reject:{threshold:g}")
    return Refusing(inner, threshold).eval()


def _load(
    spec: str, class_names: Sequence[str], templates: Sequence[str], place: torch.device, cache: bool
) -> Classifier:
    if not names_a_callable(spec) or os.path.isdir(spec):
        vlm = load_pipeline(spec, device=place)
        made = saved_model(split_spec(spec)[0])
        if made is not None:
            return made.classifier(vlm, class_names, templates, cache=cache)
    else:
        thing = create(spec)
        if not hasattr(thing, "encode_text") and not hasattr(thing, "encode_image"):
            return load_own(thing, spec, class_names, place)
        vlm = wrap_encoder(thing, spec, place)
    return ZeroShot(zero_shot(vlm, class_names, templates, cache=cache)).eval()

"""From features to scores: what they are made from, the scores of every image, and the time that takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustvlm.commands.detect.encoding import Encoded
from robustvlm.commands.detect.summary import OWN, OWN_SDIS
from robustvlm.core import LAMBDA_INF
from robustvlm.data.splits import _ROWS, copies, in_both
from robustvlm.defenses import Classifier
from robustvlm.detect import SDIS, Detector, Head, Supplies, make_scores
from robustvlm.errors import UserError, setting
from robustvlm.models.zero_shot import class_embeddings


@dataclass(frozen=True, eq=False)
class Panel:
    """The scores of a run, ready to use.

    Args:
        head: the zero-shot head; encoder: whether features are those of an encoder, and not logits.
        detectors: by name; skipped: scores that cannot be used, with the reason.
        may_refuse: the model has an acceptance score of its own.
    """

    head: Head
    encoder: bool
    detectors: dict[str, Detector]
    skipped: dict[str, str]
    may_refuse: bool
    microseconds: dict[str, float] = field(default_factory=dict)

    def inputs(self, found: Encoded) -> Tensor:
        """Return what detectors take: features, or logits in their place."""
        if self.encoder and found.features is not None:
            return found.features
        assert found.output is not None, "a model without an encoder gives logits"
        return found.output[:, : len(self.head.class_embeddings)]

    def predictions(self, found: Encoded) -> Tensor:
        """Return the class with the largest logit of every image [N], refusals left aside."""
        if found.output is not None:
            return found.output[:, : len(self.head.class_embeddings)].argmax(dim=1)
        return self.head.logits(self.inputs(found)).argmax(dim=1)

    def scores(self, found: Encoded) -> dict[str, Tensor]:
        """Return every score of every image, float64 [N] by name; the model's own acceptance first."""
        values: dict[str, Tensor] = {}
        if self.may_refuse and found.output is not None:
            values[OWN] = found.output[:, -1].double()
        inputs = self.inputs(found)
        for name, detector in self.detectors.items():
            began = time.perf_counter()
            values[name] = score_all(detector, inputs)
            self.microseconds[name] = 1e6 * (time.perf_counter() - began) / max(1, len(inputs))
        return values


def score_all(detector: Detector, inputs: Tensor) -> Tensor:
    """Return the scores of all rows [N, D] as float64 [N], some rows at a time."""
    with torch.no_grad():
        return torch.cat([detector.score(part).double() for part in inputs.split(_ROWS)])


def make_panel(
    classifier: Classifier,
    templates: Sequence[str],
    names: Sequence[str],
    fit: Encoded | None,
    words: Tensor | None,
    *,
    temperature: float = 1.0,
) -> Panel:
    """Return the named scores for a model, fitted to `fit`; `words` are unit text embeddings [W, D].

    Energies divide the logits by `temperature`.

    Raises UserError when none of them can be used.
    """
    head, encoder = head_and_kind(classifier, templates)
    features = None if fit is None or not encoder else fit.features
    labels = None if fit is None else fit.labels
    supplies = Supplies(head, encoder, features, labels, words if encoder else None, temperature)
    detectors, skipped = make_scores(names, supplies)
    reasons = {item.name: item.reason for item in skipped}
    own = own_sdis(classifier)
    if own is not None:
        detectors = {OWN_SDIS: own, **detectors}
    if not detectors and not classifier.can_reject:
        name, reason = next(iter(reasons.items()))
        raise UserError(f"none of the scores can be used; the first, '{name}': {reason}")
    return Panel(head, encoder, detectors, reasons, classifier.can_reject)


def own_sdis(classifier: Classifier) -> Detector | None:
    """Return S_DIS of an immunised model, which keeps prototypes [K, M, D] and antibodies [A, D]; None of others."""
    prototypes, antibodies = getattr(classifier, "prototypes", None), getattr(classifier, "antibodies", None)
    if not isinstance(prototypes, Tensor) or not isinstance(antibodies, Tensor) or not len(antibodies):
        return None
    flat = prototypes.detach().float().cpu().flatten(0, -2)
    return SDIS(flat, antibodies.detach().float().cpu(), float(getattr(classifier, "weight", LAMBDA_INF)))


def head_and_kind(classifier: Classifier, templates: Sequence[str]) -> tuple[Head, bool]:
    """Return the head that scores use, and whether the model has an encoder for it."""
    vlm = classifier.vlm
    if vlm is None:
        return Head.of_logits(len(classifier.class_names)), False
    texts = classifier.class_embeddings
    if texts is None or texts.ndim != 2 or len(texts) != len(classifier.class_names):  # several prototypes a class
        texts = class_embeddings(vlm, classifier.class_names, templates)
    return Head(texts.detach().float().cpu(), vlm.logit_scale), True


def require_apart(known: Encoded, fit: Encoded | None, known_spec: str, fit_spec: str | None) -> None:
    """Refuse to judge scores on images that they have learnt from: they would know them by heart."""
    both = [] if fit is None or fit_spec is None else in_both(known_spec, known.ids, fit_spec, fit.ids)
    if both:
        raise UserError(
            f"{len(both)} images are both in {setting('fit')} and in {setting('id')} (the first, '{both[0]}'): judge "
            "scores on images that they have not learnt from"
        )


def copies_of(found: Encoded, fit: Encoded | None) -> int:
    """Return how many images have the feature of one that was learnt from, to three decimals: copies, as a rule."""
    if fit is None or fit.features is None or found.features is None:
        return 0
    return copies(found.features, fit.features)


def of_known_classes(found: Encoded) -> tuple[Encoded, int]:
    """Return the images that have a known class, and how many have none."""
    rows = (found.labels >= 0).nonzero().flatten()
    return found.rows(rows), len(found.ids) - len(rows)


def mean_time(sets: Mapping[str, Encoded]) -> float:
    """Return milliseconds per image of the encoder, over all sets."""
    images = sum(len(part.ids) for part in sets.values())
    return 1000 * sum(part.seconds for part in sets.values()) / max(1, images)

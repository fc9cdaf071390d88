"""The phases in order: from encoded images, class texts and antibodies to an immunity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.immunity.antibodies import Antibodies, AntibodyText, Returning
from robustvlm.defenses.immunity.choice import Choice, choose_hinge
from robustvlm.defenses.immunity.prototypes import Prototypes, log_normaliser
from robustvlm.defenses.immunity.state import Adapter, Immunity, class_scores
from robustvlm.defenses.immunity.thresholds import (
    DEFAULT_MISS,
    MIN_IMAGES,
    Array,
    Thresholds,
    fit_thresholds,
    name_density,
)
from robustvlm.defenses.immunity.vaccine import Targets, Vaccinated, VaccineSettings, vaccinate
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.zero_shot import class_embeddings

KAPPAS = ("model", "class")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Unit features [N, D] of images with labels [N]; labels below 0 are of unknown classes."""

    features: Tensor
    labels: Tensor

    def known(self) -> Labelled:
        """Return the images of known classes."""
        return Labelled(self.features[self.labels >= 0], self.labels[self.labels >= 0])


@dataclass(frozen=True, eq=False)
class Immunised:
    """An immunity and how it came about: the vaccine's history, the thresholds' fits, why the hinge is as it is.

    `choice` is None where the score was not to be chosen.
    """

    immunity: Immunity
    vaccinated: Vaccinated
    thresholds: Thresholds
    choice: Choice | None = None


@dataclass(frozen=True, eq=False)
class Decided:
    """An immunity whose score and thresholds held-out images have set, and how."""

    immunity: Immunity
    thresholds: Thresholds
    choice: Choice | None


@dataclass(frozen=True)
class Deciding:
    """How held-out images of known classes set score and thresholds.

    Args:
        weight: lambda_inf of S_DIS; None: the hinge, chosen on the images (`choose_hinge`).
        hinge: weight and floor that are known already.
        miss, min_images, rule, tail: as for `fit_thresholds`.
    """

    weight: float | None = None
    hinge: tuple[float, float] | None = None
    miss: float = DEFAULT_MISS
    min_images: int = MIN_IMAGES
    rule: str = "equal-miss"
    tail: float | None = None
    seed: int = 0


def immunise(
    fit: Labelled,
    held_out: Labelled,
    prototypes: Prototypes,
    antibodies: Antibodies,
    class_names: Sequence[str],
    *,
    logit_scale: float,
    kappa: str = "model",
    deciding: Deciding | None = None,
    text: Tensor | None = None,
    returning: Returning | None = None,
    vaccine: VaccineSettings | None = None,
    start: Adapter | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Immunised:
    """Vaccinate, then fit the thresholds on held-out images (Immuno-VLM, arXiv 2605.30745, phases 3 and 4).

    Args:
        fit: images to train on. held_out: other images, which stop the training and set the thresholds.
        logit_scale: the model's factor on cosines.
        kappa: concentration in the likelihoods: "class", the estimate of each class (the paper), or "model", the
            model's own temperature for all. Estimates of contrastive features lie an order of magnitude above the
            temperature that the features were trained at; the likelihoods are then certain of everything, and the
            training teaches nothing but that (our reading; docs/immunize.md has the figures).
        deciding: how the held-out images set score and thresholds; by default they choose the hinge.
        text, returning: as for `decided`.
        start: begin the vaccination from this adapter.

    Raises:
        UserError: whatever the phases raise.
    """
    settings = vaccine or VaccineSettings()
    fit, held_out = fit.known(), held_out.known()
    targets = make_targets(prototypes, antibodies.embeddings, kappa=kappa, logit_scale=logit_scale)
    done = vaccinate(
        fit.features, fit.labels, held_out.features, held_out.labels, targets, settings, start=start, on_step=on_step
    )
    immunity = Immunity(
        tuple(class_names),
        prototypes.vectors.float().cpu(),
        antibodies,
        0.0,
        torch.zeros(len(class_names)),
        done.adapter.cpu(),
    )
    found = decided(immunity, held_out, deciding or Deciding(), text=text, returning=returning)
    return Immunised(found.immunity, done, found.thresholds, found.choice)


def decided(
    immunity: Immunity,
    held_out: Labelled,
    deciding: Deciding,
    *,
    text: Tensor | None = None,
    returning: Returning | None = None,
) -> Decided:
    """Return the immunity with score and thresholds set by held-out images of known classes, base features.

    Args:
        text: unit embeddings [K, D] of the class names, for thresholds by density. returning: see `choose_hinge`.

    Raises:
        UserError: too few images that are classified right.
    """
    held_out, choice = held_out.known(), None
    with torch.no_grad():
        adapted = immunity.adapter(held_out.features)
    if deciding.hinge is not None:
        immunity = replace(immunity, weight=deciding.hinge[0], floor=deciding.hinge[1])
    elif deciding.weight is not None:
        immunity = replace(immunity, weight=deciding.weight, floor=None)
    else:
        choice = choose_hinge(
            adapted,
            held_out.labels,
            immunity.prototypes,
            immunity.antibodies,
            immunity.class_names,
            returning=returning,
            seed=deciding.seed,
        )
        immunity = replace(immunity, weight=choice.weight, floor=choice.floor)
    thresholds = thresholds_of(adapted, held_out.labels, immunity, deciding, text=text)
    values = torch.tensor(thresholds.values, dtype=torch.float32)
    return Decided(replace(immunity, thresholds=values), thresholds, choice)


def make_targets(prototypes: Prototypes, antibodies: Tensor, *, kappa: str, logit_scale: float) -> Targets:
    """Return what the vaccine trains towards; `kappa` as for `immunise`.

    Raises:
        UserError: an unknown choice of kappa.
    """
    if kappa not in KAPPAS:
        raise UserError(f"--kappa is model or class, got '{kappa}'")
    own = prototypes.kappa if kappa == "class" else torch.full_like(prototypes.kappa, logit_scale)
    log_c = torch.from_numpy(log_normaliser(own.double().cpu().numpy(), prototypes.vectors.shape[-1]))
    vectors = prototypes.vectors
    # Softmax does not see what all classes share, and float32 would lose the differences in it.
    relative = (log_c - log_c.mean()).to(vectors)
    return Targets(vectors, own.to(vectors), relative, antibodies.to(vectors))


def thresholds_of(
    adapted: Tensor, labels: Tensor, immunity: Immunity, deciding: Deciding, *, text: Tensor | None = None
) -> Thresholds:
    """Return the thresholds from adapted features [N, D] of held-out images: of those that are classified right.

    Features are of unit length, or means of such, as those of noisy copies.
    """
    right = class_scores(adapted, immunity.prototypes).argmax(dim=1) == labels
    return fit_thresholds(
        immunity.score(adapted[right]).double().cpu().numpy(),
        labels[right].cpu().numpy(),
        len(immunity.class_names),
        miss=deciding.miss,
        min_images=deciding.min_images,
        rule=deciding.rule,
        tail=deciding.tail,
        density=None if text is None else name_density(text),
        strangers=_strangers(adapted, immunity) if deciding.rule == "least-fpr" else None,
    )


def _strangers(adapted: Tensor, immunity: Immunity) -> tuple[Array, npt.NDArray[np.int64]]:
    """Return scores and nearest classes of stand-ins for unknown images: antibodies, and images half turned to one.

    They are as long as the images' features. Those of noisy copies have a mean shorter than 1, that of an unknown image
    no less than that of a known one, and scores are cosines times that length.
    """
    antibodies = immunity.antibodies.embeddings.to(adapted)
    if not len(antibodies):
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    lengths, pure = adapted.norm(dim=1, keepdim=True), F.normalize(adapted, dim=1)
    mixed = lengths * F.normalize(pure + antibodies[(pure @ antibodies.T).argmax(dim=1)], dim=1)
    both = torch.cat([lengths.median() * antibodies, mixed])
    near = class_scores(both, immunity.prototypes).argmax(dim=1)
    return immunity.score(both).double().cpu().numpy(), near.cpu().numpy()


def text_only(class_names: Sequence[str], text: Tensor, antibodies: Antibodies) -> Immunity:
    """Return the immunity of the zero-shot mode: prototypes are the texts, no adapter, weight 1, thresholds 0.

    An image is accepted when it is nearer to a class than to every antibody. With the class texts and the antibodies
    as the only data, half-way between the two kinds' own scores, 1 - c and c - 1 for c = max_a <t_k, a>, lies 0
    whatever c is; and only at weight 1 does a cosine that the two modalities do not share cancel (our reading).

    Raises:
        UserError: there are no antibodies, so that nothing could ever be rejected.
    """
    if not len(antibodies):
        raise UserError("without images and without antibodies nothing tells the unknown: pass --antibodies or images")
    count, dim = text.shape
    identity = Adapter(dim, 1).eval().requires_grad_(False)
    return Immunity(tuple(class_names), text[:, None].float().cpu(), antibodies, 1.0, torch.zeros(count), identity)


def immunise_without_images(
    vlm: VLM, class_names: Sequence[str], templates: Sequence[str], antibodies: Sequence[str]
) -> Immunity:
    """Return `text_only` for a model and unfiltered antibody texts.

    Example:
        >>> from robustvlm.models import load_model
        >>> immunise_without_images(load_model("tiny"), ["apple", "dog"], ["{}"], ["peach"]).thresholds
        tensor([0., 0.])
    """
    texts = tuple(AntibodyText(text, "") for text in antibodies)
    embedded = class_embeddings(vlm, list(antibodies), templates).float().cpu() if texts else torch.zeros(0, 1)
    text = class_embeddings(vlm, class_names, templates, distinct=True).float().cpu()
    return text_only(class_names, text, Antibodies(texts, embedded))

"""The immunised classifier with its parts taken away, and the scores that stand beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustvlm.commands.immunize.images import NOISE_PER_CLASS, embedder
from robustvlm.commands.immunize.record import judged
from robustvlm.data.names import words_of
from robustvlm.defenses.immunity import (
    Immunised,
    Immunity,
    Labelled,
    VaccineSettings,
    fit_prototypes,
    immunise,
    text_only,
)
from robustvlm.defenses.immunity.antibodies import (
    Antibodies,
    AntibodyText,
    Returning,
    automatic_band,
    filter_antibodies,
    noise_antibodies,
    open_source,
    returning,
)
from robustvlm.defenses.immunity.recipe import Deciding
from robustvlm.defenses.immunity.vaccine import automatic_margin
from robustvlm.detect import Head, Supplies, make_scores

from .sets import Task, texts_of

Array = npt.NDArray[np.float64]
BASELINES = ("mcm", "max-logit", "energy", "delta-energy", "mahalanobis", "knn", "gda", "neglabel")


@dataclass(frozen=True)
class Variant:
    """Settings of one row; the defaults are those of `--rule s-dis --tail 0.5 --push-nearest 0`, which the table is of.

    A `weight` of None is the hinge, chosen on the held-out images, with the command's own tail and push.
    """

    name: str
    antibodies: str = "bank"
    xi: float | None = None
    weight: float | None = 0.5
    kappa: str = "model"
    push_weight: float = 1.0
    margin: float | None = 0.2
    steps: int = 400
    per_class: int = 1
    thresholds: bool = True
    rule: str = "equal-miss"
    images: bool = True
    extra: dict[str, float] = field(default_factory=dict)


VARIANTS = (
    Variant("immunised"),
    Variant("- hinge, chosen", weight=None),
    Variant("- no push", push_weight=0.0),
    Variant("- no vaccine", steps=0),
    Variant("- no EVT", thresholds=False),
    Variant("- visual mean only", xi=180.0),
    Variant("- text only", xi=0.0),
    Variant("- no antibodies", antibodies="none"),
    Variant("- noise antibodies", antibodies="noise"),
    Variant("- antibodies that name no unknown thing", antibodies="unnamed"),
    Variant("- antibodies: the unknown things' own names (upper bound)", antibodies="named"),
    Variant("- kappa of each class", kappa="class"),
    Variant("- margin from the data", margin=None),
    Variant("- two prototypes a class", per_class=2),
    Variant("zero-shot, no images", images=False),
)

OF_SPLITS = (
    Variant("default: hinge, bank", weight=None),
    Variant("- antibodies that name no unknown thing", antibodies="unnamed", weight=None),
    Variant("- antibodies: the unknown things' own names (upper bound)", antibodies="named", weight=None),
    Variant("- noise antibodies", antibodies="noise", weight=None),
    Variant("- no antibodies", antibodies="none", weight=None),
    Variant("- no vaccine", steps=0, weight=None),
    Variant("- MixOE, weight 1", weight=None, extra={"mix_weight": 1.0}),
    Variant("- MixOE, weight 5", weight=None, extra={"mix_weight": 5.0}),
    Variant("- MixOE, weight 5, noise antibodies", antibodies="noise", weight=None, extra={"mix_weight": 5.0}),
    Variant("- thresholds least-fpr", rule="least-fpr", weight=None),
    Variant("- S_DIS at .5, as it was the default"),
)
"""Rows of the table over five splits: the default of `immunize`, and what differs from it."""
MISS = 0.05


@dataclass(frozen=True, eq=False)
class Scored:
    """What one row says: scores of known and unknown images, and the share of known ones that are classified right."""

    known: Array
    unknown: dict[str, Array]
    right: Array
    accepted: dict[str, float]
    note: str = ""


def baselines(task: Task) -> dict[str, Scored]:
    """Return the scores that need no training, on the features as they are."""
    text = texts_of(task)
    head = Head(text, task.vlm.logit_scale)
    words = antibodies_of(task, Variant("words"), text[:, None], text).embeddings
    fit = task.fit
    supplies = Supplies(head, True, fit.features, fit.labels, words if len(words) else None)
    made, _ = make_scores(BASELINES, supplies)
    right = ((task.known.features @ text.T).argmax(dim=1) == task.known.labels).double().numpy()
    held = task.held_out.features[(task.held_out.features @ text.T).argmax(dim=1) == task.held_out.labels]
    found = {}
    for name, detector in made.items():
        score = {key: detector.score(part.features).double().numpy() for key, part in task.unknown.items()}
        known = detector.score(task.known.features).double().numpy()
        # One threshold of the held-out images that are classified right, at the miss that `immunize` asks for.
        threshold = float(np.quantile(detector.score(held).double().numpy(), MISS))
        accepted = {key: float((values > threshold).mean()) for key, values in (score | {"known": known}).items()}
        found[name] = Scored(known, score, right, accepted)
    return found


def scored(task: Task, variant: Variant, seed: int) -> Scored:
    """Return the scores of one variant."""
    immunity, note = made(task, variant, seed)
    predicted, acceptance = judged(immunity, task.known.features)
    sides = {name: judged(immunity, part.features)[1] for name, part in task.unknown.items()}
    accepted = {name: float((values > 0).double().mean()) for name, values in sides.items()}
    accepted["known"] = float((acceptance > 0).double().mean())
    right = (predicted == task.known.labels).double().numpy()
    if variant.thresholds:
        unknown = {name: values.double().numpy() for name, values in sides.items()}
        return Scored(acceptance.double().numpy(), unknown, right, accepted, note)
    plain = {name: bare(immunity, part.features) for name, part in task.unknown.items()}
    return Scored(bare(immunity, task.known.features), plain, right, accepted, note)


def bare(immunity: Immunity, features: Tensor) -> Array:
    """Return the score without thresholds."""
    with torch.no_grad():
        adapted = immunity.adapter(features)
    return np.asarray(immunity.score(adapted).double().numpy())


def made(task: Task, variant: Variant, seed: int) -> tuple[Immunity, str]:
    """Return the immunity of one variant, and a word on its vaccine."""
    text = texts_of(task)
    if not variant.images:
        return text_only(task.class_names, text, antibodies_of(task, variant, text[:, None], text)), ""
    fit, held = task.fit, task.held_out
    xi = None if variant.xi is None else math.radians(variant.xi)
    prototypes = fit_prototypes(fit.features, fit.labels, text, xi=xi, per_class=variant.per_class, seed=seed)
    antibodies = antibodies_of(task, variant, prototypes.vectors, text, seed)
    margin = automatic_margin(fit.features, antibodies.embeddings) if variant.margin is None else variant.margin
    vaccine = VaccineSettings(
        push_weight=variant.push_weight,
        margin=margin,
        steps=variant.steps,
        push_nearest=10 if variant.weight is None else 0,
        seed=seed,
        **variant.extra,  # type: ignore[arg-type]
    )
    done: Immunised = immunise(
        Labelled(fit.features, fit.labels),
        Labelled(held.features, held.labels),
        prototypes,
        antibodies,
        task.class_names,
        logit_scale=task.vlm.logit_scale,
        kappa=variant.kappa,
        deciding=Deciding(variant.weight, rule=variant.rule, tail=None if variant.weight is None else 0.5, seed=seed),
        returning=returning_of(task, variant, prototypes.vectors, text),
        vaccine=vaccine,
    )
    pooled = sum(item.pooled for item in done.thresholds.classes)
    weight = f"weight {done.immunity.weight:g}"
    return done.immunity, f"{len(antibodies)} antibodies, {weight}, step {done.vaccinated.chosen}, {pooled} pooled"


def returning_of(task: Task, variant: Variant, prototypes: Tensor, text: Tensor) -> Returning | None:
    """Return the texts of the bank that were dropped for naming a known class, which the hinge is chosen with."""
    if variant.weight is not None or variant.antibodies not in ("bank", "unnamed"):
        return None
    proposal = open_source("bank").propose(task.class_names)
    return returning(proposal, task.class_names, text, prototypes=prototypes, band=automatic_band(prototypes, text))


def possible(task: Task, variant: Variant) -> bool:
    """Whether a variant can be made: without images and without antibodies nothing tells the unknown."""
    if variant.images:
        return True
    text = texts_of(task)
    return len(antibodies_of(task, variant, text[:, None], text)) > 0


def antibodies_of(task: Task, variant: Variant, prototypes: Tensor, text: Tensor, seed: int = 0) -> Antibodies:
    """Return the antibodies of a variant: `unnamed` is the bank without the names of the unknown things."""
    dim = text.shape[1]
    if variant.antibodies == "none":
        return Antibodies((), torch.zeros(0, dim))
    if variant.antibodies == "noise":
        return noise_antibodies(NOISE_PER_CLASS * len(task.class_names), dim, seed=seed)
    if variant.antibodies == "named":
        texts = tuple(AntibodyText(name, "") for name in task.unknown_names)
        return Antibodies(texts, embedder(task.vlm, task.source.templates)(task.unknown_names))
    proposal = open_source("bank").propose(task.class_names)
    band = automatic_band(prototypes, text)
    embed = embedder(task.vlm, task.source.templates)
    kept = filter_antibodies(proposal, embed, prototypes, task.class_names, band=band).kept
    if variant.antibodies == "bank":
        return kept
    named = {words_of(name) for name in task.unknown_names}
    chosen = [i for i, text_ in enumerate(kept.texts) if words_of(text_.text) not in named]
    return Antibodies(tuple(kept.texts[i] for i in chosen), kept.embeddings[chosen])

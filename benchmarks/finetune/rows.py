"""One row of the results: a variant tuned with one seed, and everything that is measured of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robustvlm.attacks import Superclass, ThreatModel
from robustvlm.defenses.classifier import ZeroShot
from robustvlm.defenses.finetune import FinetuneSettings, InnerAttack, finetune_task
from robustvlm.defenses.finetune.trainable import merge
from robustvlm.models import VLM, load_model, zero_shot
from robustvlm.training import Trainer, TrainingConfig, TrainingImages
from robustvlm.training.images import AUGMENTATIONS

from .measure import Images, right_when_attacked, right_when_clean
from .sets import BenchmarkSet, Condition
from .variants import Variant

CALIBRATION = 64


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        steps, inner_steps: of training and of the attack in it; eps: of both attacks.
        train_images: to draw batches from.
        attacked: images under PGD-20; ensemble: images under `ensemble_attack`, which may be none.
        precision: of training and of the gradients of attacks.
    """

    eps: float
    steps: int
    inner_steps: int
    train_images: int
    attacked: int
    ensemble: int
    ensemble_attack: str
    precision: str = "bf16"

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel("Linf", self.eps)


def make_row(benchmark: BenchmarkSet, variant: Variant, seed: int, data: TrainingImages, plan: Plan) -> dict[str, Any]:
    """Tune and measure; per-image outcomes are kept as texts of 0 and 1, so that variants can be paired."""
    vlm = load_model(benchmark.model)
    row: dict[str, Any] = {"title": variant.title, "set": benchmark.name, "seed": seed}
    if variant.method is not None:
        row["record"] = tune(vlm, benchmark, variant, seed, data, plan)
    left_out = [condition.name for condition in benchmark.transfer if condition.left_out]
    found = {**_seen(vlm, benchmark, plan), "transfer": _transfer(vlm, benchmark, plan)}
    return {**row, **found, **({"left out": left_out} if left_out else {})}


def tune(
    vlm: VLM, benchmark: BenchmarkSet, variant: Variant, seed: int, data: TrainingImages, plan: Plan
) -> dict[str, Any]:
    """Tune in place; return the method's choices and the first and last terms of its loss."""
    assert variant.method is not None
    first = next(iter(data.batches([range(CALIBRATION)])))
    forest = benchmark.forest if variant.forest else type(benchmark.forest)((benchmark.forest[0],))
    task = finetune_task(
        vlm,
        FinetuneSettings(
            method=variant.method,
            attack=InnerAttack(threat=plan.threat, steps=plan.inner_steps),
            options=variant.options,
        ),
        class_names=benchmark.train.class_names,
        templates=benchmark.train.templates,
        calibration=first.pixels,
        forest=forest,
        in_place=True,
        teacher=None if variant.teacher is None else load_model(variant.teacher),
    )
    config = TrainingConfig(
        steps=plan.steps,
        batch_size=benchmark.batch,
        lr=benchmark.lr,
        warmup=10,
        precision=plan.precision,
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        history = Trainer(task, data, config).fit(Path(folder))
    merge(vlm)
    vlm.requires_grad_(False)
    return {
        "settings": task.method.settings(),
        "first": history.steps[0].terms,
        "last": history.steps[-1].terms,
        "measures": dict(task.method.measures()),
    }


def training_images(benchmark: BenchmarkSet, seed: int, plan: Plan) -> TrainingImages:
    """Return the images that all variants of a seed are tuned on, in one order."""
    size = load_model(benchmark.model).image_size
    return TrainingImages(benchmark.train, size=size, seed=seed, how=AUGMENTATIONS["crop"], limit=plan.train_images)


def classifier_of(vlm: VLM, condition: Condition, templates: tuple[str, ...]) -> ZeroShot:
    return ZeroShot(zero_shot(vlm, condition.class_names, templates, cache=False))


def _seen(vlm: VLM, benchmark: BenchmarkSet, plan: Plan) -> dict[str, Any]:
    """Measure the classes tuned on: leaves, superclasses by their classes, superclasses by their own names."""
    images, tree = benchmark.seen.images, benchmark.forest[0]
    classifier = classifier_of(vlm, benchmark.seen, benchmark.train.templates)
    few, attacked = images.first(plan.attacked), partial(right_when_attacked, precision=plan.precision)
    found: dict[str, Any] = {
        "clean": bits(right_when_clean(classifier, images)),
        "pgd": bits(attacked(classifier, few, "pgd", plan.threat)),
        "ensemble": bits(attacked(classifier, images.first(plan.ensemble), plan.ensemble_attack, plan.threat))
        if plan.ensemble
        else "",
    }
    for level in range(1, tree.levels - 1) if benchmark.levels else ():
        groups = torch.tensor(tree.superclass_labels(level))
        goal = Superclass(groups, str(level))
        found[f"superclass {level}"] = {
            "clean": bits(right_when_clean(classifier, images, goal)),
            "pgd": bits(attacked(classifier, few, "pgd", plan.threat, goal=goal)),
        }
    names, groups = tree.level_names(1), torch.tensor(tree.superclass_labels(1))
    named = Condition("", names, Images(images.pixels, groups[images.labels], images.ids))
    found["superclass 1 by name"] = clean_and_pgd(vlm, named, benchmark.train.templates, plan)
    return found


def _transfer(vlm: VLM, benchmark: BenchmarkSet, plan: Plan) -> dict[str, Any]:
    templates = benchmark.train.templates
    return {condition.name: clean_and_pgd(vlm, condition, templates, plan) for condition in benchmark.transfer}


def clean_and_pgd(vlm: VLM, condition: Condition, templates: tuple[str, ...], plan: Plan) -> dict[str, str]:
    """Return outcomes per image of one condition, without attack and under PGD-20."""
    classifier = classifier_of(vlm, condition, templates)
    few = condition.images.first(plan.attacked)
    return {
        "clean": bits(right_when_clean(classifier, condition.images)),
        "pgd": bits(right_when_attacked(classifier, few, "pgd", plan.threat, precision=plan.precision)),
    }


def bits(outcomes: list[bool]) -> str:
    return "".join("1" if right else "0" for right in outcomes)

"""How robust a classifier is, by the attack engine: which of its images stay right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustvlm.attacks import Goal, Job, LaneEngine, Misclassify, Oracle, ThreatModel, parse_attacks
from robustvlm.attacks.base import LaneAttack
from robustvlm.attacks.goals import Case
from robustvlm.defenses import Classifier

LANES = 100


@dataclass(frozen=True)
class Images:
    """Images in memory: pixels [N, 3, S, S] in [0, 1] at the model's size, labels [N] and ids."""

    pixels: Tensor
    labels: Tensor
    ids: tuple[str, ...]

    def first(self, count: int) -> Images:
        return Images(self.pixels[:count], self.labels[:count], self.ids[:count])


def right_when_clean(classifier: Classifier, images: Images, goal: Goal | None = None) -> list[bool]:
    """Return per image whether the goal is not reached without an attack."""
    goal, oracle = goal or Misclassify(), Oracle(classifier)
    found = [
        ~goal.reached(oracle.confirm(pixels), Case(labels))
        for pixels, labels in zip(images.pixels.split(LANES), images.labels.split(LANES), strict=True)
    ]
    return [bool(value) for value in torch.cat(found)]


def right_when_attacked(
    classifier: Classifier,
    images: Images,
    attacks: str,
    threat: ThreatModel,
    *,
    goal: Goal | None = None,
    seed: int = 0,
    precision: str = "bf16",
) -> list[bool]:
    """Return per image whether it is right when clean and survives every attack of a list such as `pgd` or `fare`.

    Args:
        precision: of the gradients; what counts as fooled is looked at again in single precision.
    """
    goal, oracle = goal or Misclassify(), Oracle(classifier, precision=precision)
    alive = right_when_clean(classifier, images, goal)
    for attack in parse_attacks(attacks):
        assert isinstance(attack, LaneAttack)
        engine = LaneEngine(oracle, attack, threat, lanes=LANES, seed=seed, goal=goal)
        for result in engine.run(_jobs(oracle, images, alive, goal)):
            alive[result.job.index] = result.outcome == "robust"
    return alive


def predictions_when_attacked(
    classifier: Classifier,
    images: Images,
    attack: str,
    threat: ThreatModel,
    goal: Goal,
    *,
    seed: int = 0,
    precision: str = "bf16",
) -> Tensor:
    """Return the classes [N] predicted where an attack on a goal ended; unperturbed for images wrong without it."""
    oracle = Oracle(classifier, precision=precision)
    outputs = torch.cat([oracle.confirm(pixels) for pixels in images.pixels.split(LANES)])
    found = outputs[:, : len(classifier.class_names)].argmax(dim=1)
    (parsed,) = parse_attacks(attack)
    assert isinstance(parsed, LaneAttack)
    engine = LaneEngine(oracle, parsed, threat, lanes=LANES, seed=seed, goal=goal)
    for result in engine.run(_jobs(oracle, images, right_when_clean(classifier, images, goal), goal)):
        found[result.job.index] = result.prediction
    return found


def _jobs(oracle: Oracle, images: Images, alive: Sequence[bool], goal: Goal) -> list[Job]:
    rows = [i for i, right in enumerate(alive) if right]
    if not rows:
        return []
    outputs = torch.cat([oracle.confirm(pixels) for pixels in images.pixels[rows].split(LANES)])
    return [
        Job(images.ids[i], i, images.pixels[i], label, tuple(goal.targets(output, label, 9)))
        for i, output in zip(rows, outputs, strict=True)
        for label in [int(images.labels[i])]
    ]

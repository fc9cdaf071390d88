"""What a model says of unperturbed images, over its draws if it is random, and what goals have to know of that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.goals import AcceptedMistake, Case, Goal
from robustvlm.attacks.goals.feature import FeatureGoal
from robustvlm.attacks.jobs import Job
from robustvlm.attacks.objectives import margin
from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.tally import Answer, Tally


@dataclass(frozen=True)
class Unperturbed:
    """Clean images: the answers of a goal, the model's mean output [B, O], and the goal's reference [B, R] or None."""

    answer: Answer
    output: Tensor
    reference: Tensor | None


def ask_unperturbed(oracle: Oracle, goal: Goal, images: Tensor, label: Tensor) -> Unperturbed:
    """Return what the model says of clean images [B, 3, H, W] with labels [B].

    The clean feature of a random model is the unit mean over its draws; fresh draws are then compared with it.

    Example:
        >>> from robustvlm.attacks import Misclassify
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> ask_unperturbed(oracle, Misclassify(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])).output.shape
        torch.Size([2, 3])
    """
    label = label.to(oracle.device)
    outputs = [oracle.confirm(images)]
    total = outputs[0]
    keep = not isinstance(goal, FeatureGoal) or oracle.draws == 1
    for _ in range(oracle.draws - 1):
        output = oracle.confirm(images)
        total = total + output
        if keep:
            outputs.append(output)
    mean = total / oracle.draws
    case = Case(label, label, _reference(goal, mean, label))
    if not keep:
        return Unperturbed(oracle.judge(images, goal, case), mean, case.reference)
    tally = Tally(goal, case, len(images), oracle.device)
    for output in outputs:
        tally.add(output)
    return Unperturbed(tally.answer(), mean, case.reference)


def _reference(goal: Goal, output: Tensor, label: Tensor) -> Tensor | None:
    if isinstance(goal, FeatureGoal):
        return F.normalize(output, dim=1)
    if isinstance(goal, AcceptedMistake):
        return torch.stack([margin(output[:, :-1], label), output[:, -1]], dim=1)
    return None


def needs_briefing(goal: Goal) -> bool:
    """Whether a goal has to know more of the clean images than the clean pass keeps."""
    return isinstance(goal, FeatureGoal | AcceptedMistake)


def brief(
    jobs: Iterable[Job], oracle: Oracle, goal: Goal, rungs: Sequence[int], n_targets: int
) -> Iterator[tuple[Job, bool]]:
    """Yield every job with the goal's reference and targets, and whether its image reaches the goal unperturbed.

    The model is asked in full batches, or in batches of a size at which it is known to give the same answers.
    """
    source = iter(jobs)
    while batch := list(islice(source, rungs[0])):
        rows = torch.arange(min(rung for rung in rungs if rung >= len(batch))) % len(batch)
        images = torch.stack([job.pixels for job in batch])[rows]
        label = torch.tensor([job.label for job in batch])[rows]
        found = ask_unperturbed(oracle, goal, images, label)
        reached, outputs = found.answer.reached.tolist(), found.output.cpu()
        for row, job in enumerate(batch):
            known = None if found.reference is None else found.reference[row]
            aims = tuple(goal.targets(outputs[row], job.label, n_targets))
            yield replace(job, targets=aims, reference=known), reached[row]

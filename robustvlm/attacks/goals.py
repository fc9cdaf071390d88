"""Goals: what the attacker wants of the model, as functions of the model's raw output.

| goal               | output                | reached when                                                          |
|--------------------|-----------------------|-----------------------------------------------------------------------|
| `misclassify`      | logits                | the predicted class is wrong (and accepted, if the model may refuse)  |
| `superclass:LEVEL` | logits                | the predicted class lies in another superclass of that level          |
| `superclass:all`   | logits                | the same at the coarsest level, by one perturbation for all levels    |
| `targeted:CLASS`   | logits                | the predicted class is CLASS                                          |
| `deny`             | logits and acceptance | the model rejects the image                                           |
| `intrude`          | logits and acceptance | the model accepts the image                                           |
| `feature`          | unit features         | the cosine to the clean feature is below a threshold                  |
| `feature:TARGET`   | unit features         | the feature is nearer to the target's than to its rival's             |

A model that may refuse returns one column more than there are classes: the acceptance score, positive when the image
is accepted. Every goal is a margin that is positive until the goal is reached, so attacks, best iterates and verdicts
work alike for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.objectives import Objective, margin, objective
from robustvlm.core.seeds import row_sums, rows_times
from robustvlm.errors import UserError, nearest

# The contract of a goal, and what it has to know of each row

REJECTED = -1


@dataclass(frozen=True)
class Case:
    """What a goal has to know of each row: label [B] and target class [B] (int64), and a reference [B, R] or None.

    Example:
        >>> import torch
        >>> Case(torch.tensor([2, 0])).rows(torch.tensor([1])).label.tolist()
        [0]
    """

    label: Tensor
    target: Tensor | None = None
    reference: Tensor | None = None

    def rows(self, index: Tensor) -> Case:
        """Return the case of some rows."""
        return Case(
            self.label[index],
            None if self.target is None else self.target[index],
            None if self.reference is None else self.reference[index],
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        """Return the case on a device, references in the type of the model's outputs."""
        return Case(
            self.label.to(device),
            None if self.target is None else self.target.to(device),
            None if self.reference is None else self.reference.to(device, dtype),
        )

    @property
    def aim(self) -> Tensor:
        """The target classes; the labels where there are none."""
        return self.label if self.target is None else self.target


class Goal(ABC):
    """What counts as success, and how an attack's objective is read for it.

    Attributes:
        spec: the goal as written on the command line.
        two_way: there are only two outcomes, so that an attack with targets has one of them to aim at.
        still_at_image: the gradient vanishes at the clean image, so that attacks must start elsewhere.
    """

    spec: str
    two_way: bool = False
    still_at_image: bool = False

    @abstractmethod
    def margin(self, output: Tensor, case: Case) -> Tensor:
        """Return [B] numbers, positive as long as the goal is not reached; the smaller, the nearer."""

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return what an attack with this objective maximises, [B]; goals without classes to tell apart: -margin."""
        del objective
        return -self.margin(output, case)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        """Return where the goal is reached, bool [B]."""
        return self.margin(output, case) < 0

    def prediction(self, output: Tensor) -> Tensor:
        """Return the predicted classes, int64 [B]; -1 stands for a rejected image or a model without classes."""
        return output.argmax(1)

    def confidence(self, output: Tensor) -> Tensor:
        """Return the softmax probability of the leading class, float64 [B]; NaN for a model without classes."""
        return output.double().softmax(1).amax(1)

    def cosine(self, output: Tensor, case: Case) -> Tensor | None:
        """Return the cosine that a feature goal is about, [B]; None for other goals."""
        del output, case
        return None

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        """Return up to `n` classes worth aiming at, the likeliest first, from one clean output [O]."""
        del clean_output, n
        return [label]


# Goals of class predictions: any wrong class, or a given one


class Misclassify(Goal):
    """Any wrong class.

    Example:
        >>> Misclassify().reached(torch.tensor([[1.0, 2.0]]), Case(torch.tensor([0]))).item()
        True
    """

    spec = "misclassify"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return margin(output, case.label)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        return objective(output, case.label, case.aim)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) != case.label

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        order = torch.argsort(clean_output, descending=True, stable=True).tolist()
        return [index for index in order if index != label][:n]


class Targeted(Goal):
    """One given class, whatever the true one."""

    two_way = True

    def __init__(self, target: int, name: str = "") -> None:
        self.target, self.spec = target, f"targeted:{name or target}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return -margin(output, self._aim(case))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        aim = self._aim(case)
        rival = output.scatter(1, aim[:, None], float("-inf")).argmax(1)
        return _targeted_form(objective)(output, rival, aim)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) == self._aim(case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        del clean_output, label, n
        return [self.target]

    def _aim(self, case: Case) -> Tensor:
        return torch.full_like(case.label, self.target)


def _targeted_form(chosen: Objective) -> Objective:
    return chosen if chosen.targeted else objective(f"{chosen.name}-t")


# Goals against a model that may refuse: an accepted mistake, a rejected known image, an accepted unknown one

# How far past its threshold a condition is pushed when two must hold at once, in units of its clean distance: without
# it a perturbation would hover on the edge of both.
_OVERSHOOT = 0.05


class Refusable(Goal):
    """A goal against a model whose last output column is the acceptance score."""

    def prediction(self, output: Tensor) -> Tensor:
        return torch.where(output[:, -1] > 0, output[:, :-1].argmax(1), REJECTED)

    def confidence(self, output: Tensor) -> Tensor:
        return super().confidence(output[:, :-1])


class AcceptedMistake(Refusable):
    """A wrong class that the model accepts.

    Two conditions must hold at once. The loss sums how far each is from holding, in units of its distance at the clean
    image (the reference [B, 2]: clean margin, clean acceptance), so neither drowns the other; an objective contributes
    its choice of class only (the target, or the leading wrong one).
    """

    spec = "misclassify"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return torch.maximum(margin(output[:, :-1], case.label), -output[:, -1])

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        logits, acceptance = output[:, :-1], output[:, -1]
        ahead = margin(logits, case.label)
        if objective.targeted:
            ahead = (logits.gather(1, case.label[:, None]) - logits.gather(1, case.aim[:, None])).squeeze(1)
        scale = output.new_ones(len(output), 2) if case.reference is None else case.reference.abs().clamp_min(1e-6)
        return -F.relu(ahead / scale[:, 0] + _OVERSHOOT) - F.relu(_OVERSHOOT - acceptance / scale[:, 1])

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return (output[:, :-1].argmax(1) != case.label) & (output[:, -1] > 0)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return Misclassify().targets(clean_output[:-1], label, n)


class Deny(Refusable):
    """Rejection of an image that the model accepts."""

    spec, two_way = "deny", True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return output[:, -1]

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.margin(output, case) <= 0


class Intrude(Refusable):
    """Acceptance of an image that the model rejects, as any class."""

    spec, two_way = "intrude", True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return -output[:, -1]


# Goals of a class tree: wrong at one level, or at all levels by one perturbation


class Superclass(Goal):
    """A class of another superclass, at one level of the class tree.

    The logit of a superclass is the largest of its classes' logits, so that the leading superclass is the one of the
    predicted class.

    Args:
        groups: superclass of every class, int64 [K], numbered from 0.
        level: how the level is named.

    Example:
        >>> goal = Superclass(torch.tensor([0, 0, 1]), "1")
        >>> goal.margin(torch.tensor([[1.0, 3.0, 2.0]]), Case(torch.tensor([0]))).item()
        1.0
    """

    def __init__(self, groups: Tensor, level: str) -> None:
        self.groups, self.spec = groups, f"superclass:{level}"
        self.n_groups = int(groups.max()) + 1

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return margin(self.group_logits(output), self.group_of(case.label))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        return objective(self.group_logits(output), self.group_of(case.label), self.group_of(case.aim))

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.group_of(output.argmax(1)) != self.group_of(case.label)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        """Return the leading class of every other superclass, the likeliest first."""
        groups = self.groups.tolist()
        leaders: dict[int, int] = {groups[label]: label}
        for index in torch.argsort(clean_output, descending=True, stable=True).tolist():
            leaders.setdefault(groups[index], index)
        return list(leaders.values())[1 : n + 1]

    def group_logits(self, output: Tensor) -> Tensor:
        """Return the largest logit of every superclass, [B, K] -> [B, S]."""
        index = self.groups.to(output.device).expand(len(output), -1)
        empty = output.new_full((len(output), self.n_groups), float("-inf"))
        return empty.scatter_reduce(1, index, output, reduce="amax")

    def group_of(self, classes: Tensor) -> Tensor:
        """Return the superclasses of classes, int64 [B]."""
        return self.groups.to(classes.device)[classes]


class SuperclassAll(Goal):
    """One perturbation against all levels at once; reached at the coarsest level, which is wrong at all finer ones.

    The loss is the sum over levels l = 0 (classes) .. L of the objective there, weighted 1 - l / (L + 1)
    (arXiv 2604.18867, the HITA loss's weights). A target of the same superclass says nothing at a level, so the level
    is left out for that image.

    Args:
        levels: goals of the levels from the finest (level 0, every class by itself) to the coarsest below the root.
    """

    spec = "superclass:all"

    def __init__(self, levels: Sequence[Superclass]) -> None:
        self.levels = tuple(levels)
        self.weights = [1 - level / (len(levels) + 1) for level in range(len(levels))]

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return self.levels[-1].margin(output, case)

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        total = output.new_zeros(len(output))
        for weight, level in zip(self.weights, self.levels, strict=True):
            part = level.loss(output, objective, case)
            if objective.targeted:
                part = torch.where(level.group_of(case.aim) == level.group_of(case.label), torch.zeros_like(part), part)
            total = total + weight * part
        return total

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.levels[-1].reached(output, case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return self.levels[-1].targets(clean_output, label, n)


# Goals about the feature itself: away from the clean one, or to a target


class FeatureGoal(Goal):
    """A goal about unit features [B, D]; the reference holds every image's clean feature.

    Args:
        head: class weights [K, D] that turn features into logits, for predictions; None: there are no classes.
    """

    two_way = True

    def __init__(self, head: Tensor | None = None) -> None:
        self.head = head

    def prediction(self, output: Tensor) -> Tensor:
        if self.head is None:
            return torch.full((len(output),), REJECTED, dtype=torch.int64, device=output.device)
        return rows_times(output, self.head.to(output)).argmax(1)

    def confidence(self, output: Tensor) -> Tensor:
        if self.head is None:
            return torch.full((len(output),), float("nan"), dtype=torch.float64, device=output.device)
        return rows_times(output, self.head.to(output)).double().softmax(1).amax(1)


class FeatureAway(FeatureGoal):
    """A feature whose cosine to the image's clean feature lies below `min_cos`.

    Example:
        >>> goal = FeatureAway(0.5)
        >>> goal.margin(torch.tensor([[0.6, 0.8]]), Case(torch.tensor([0]), None, torch.tensor([[1.0, 0.0]]))).item()
        0.10000...
    """

    spec, still_at_image = "feature", True

    def __init__(self, min_cos: float = 0.5, *, head: Tensor | None = None) -> None:
        super().__init__(head)
        self.min_cos = min_cos

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return self.cosine(output, case) - self.min_cos

    def cosine(self, output: Tensor, case: Case) -> Tensor:
        return _cosine(output, _own(case))


class FeatureTo(FeatureGoal):
    """A feature nearer to a target's than to a rival's: the image's own clean feature, or the text of its class.

    Args:
        target: unit feature [D].
        rivals: unit features [K, D] of the classes' texts, indexed by the label; None: the image's own clean feature.
        name: how the target is named.
    """

    def __init__(
        self, target: Tensor, rivals: Tensor | None = None, name: str = "target", *, head: Tensor | None = None
    ) -> None:
        super().__init__(head)
        self.target, self.rivals, self.spec = target, rivals, f"feature:{name}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        rival = _own(case) if self.rivals is None else self.rivals.to(output)[case.label]
        return _cosine(output, rival) - self.cosine(output, case)

    def cosine(self, output: Tensor, case: Case) -> Tensor:
        del case
        return _cosine(output, self.target.to(output).expand_as(output))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return row_sums(a * b.to(a))


def _own(case: Case) -> Tensor:
    assert case.reference is not None, "feature goals need the clean features"
    return case.reference


# Goals by name, for a model in hand and nothing else: no data, no class tree

_WORDS = ("misclassify", "targeted:CLASS", "deny", "intrude", "feature")


def goal_named(text: str, model: Any) -> Goal:
    """Return the goal of a word, for a model that may say `can_reject`, `class_names` and `class_embeddings`.

    Raises:
        UserError: an unknown word or class, or a goal that the model does not allow.

    Example:
        >>> goal_named("targeted:1", object()).target
        1
    """
    kind, _, rest = str(text).strip().partition(":")
    refuses = bool(getattr(model, "can_reject", False))
    if kind in ("deny", "intrude") and not rest:
        if not refuses:
            raise UserError(
                f"goal '{kind}' needs a model that may refuse: pass load_classifier('MODEL+reject:0.5', ...)"
            )
        return Deny() if kind == "deny" else Intrude()
    if kind == "misclassify" and not rest:
        return AcceptedMistake() if refuses else Misclassify()
    if kind == "feature" and not rest:
        embeddings = getattr(model, "class_embeddings", None)
        return FeatureAway(head=None if embeddings is None else (model.logit_scale * embeddings).detach())
    if kind == "targeted" and rest:
        if refuses:
            raise UserError("goal 'targeted' is for models that never refuse: attack the model without its refusal")
        return _targeted(rest.strip(), list(getattr(model, "class_names", ())))
    raise UserError(
        f"unknown goal '{text}': {nearest(kind, _WORDS)} (or an object, as robustvlm.attacks.Superclass(...))"
    )


def _targeted(text: str, names: list[str]) -> Targeted:
    if text in names:
        return Targeted(names.index(text), text)
    if text.isascii() and text.isdigit() and (not names or int(text) < len(names)):
        return Targeted(int(text))
    raise UserError(f"goal 'targeted:{text}' names no class: {nearest(text, names) if names else 'pass its number'}")

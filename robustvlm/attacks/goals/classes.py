"""Goals of class predictions: any wrong class, a given one, another superclass, and what a model that refuses adds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.attacks.goals.base import GOALS, REJECTED, ROBUST, Case, Goal, GoalKind, GoalWords, Known
from robustvlm.attacks.objectives import Objective, margin, objective
from robustvlm.core.device import sent
from robustvlm.errors import UserError, nearest, setting
from robustvlm.text import name_key, places_of

# Any wrong class, or a given one


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

    def tells(self, objective: Objective) -> bool:
        del objective
        return type(self).loss is Misclassify.loss

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) != case.label

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        order = torch.argsort(clean_output, descending=True, stable=True).tolist()
        return [index for index in order if index != label][:n]


class Targeted(Goal):
    """One given class, whatever the true one."""

    labelled = False

    def __init__(self, target: int, name: str = "") -> None:
        self.target, self.spec = target, f"targeted:{name or target}"

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return -margin(output, self._aim(case))

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        aim = self._aim(case)
        rival = output.scatter(1, aim[:, None], float("-inf")).argmax(1)
        return _targeted_form(objective)(output, rival, aim)

    def tells(self, objective: Objective) -> bool:
        del objective
        return type(self).loss is Targeted.loss

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return output.argmax(1) == self._aim(case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        del clean_output, label, n
        return [self.target]

    def _aim(self, case: Case) -> Tensor:
        return torch.full_like(case.label, self.target)


def _targeted_form(chosen: Objective) -> Objective:
    return chosen if chosen.targeted else objective(f"{chosen.name}-t")


# Against a model that may refuse: an accepted mistake, a rejected known image, an accepted unknown one

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

    spec, refers = "misclassify", True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        return torch.maximum(margin(output[:, :-1], case.label), -output[:, -1])

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        ahead, acceptance = self._conditions(output, objective, case)
        return -F.relu(ahead + _OVERSHOOT) - F.relu(_OVERSHOOT - acceptance)

    def boundary(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return how far the condition that is further from holding is past it; the loss is never above zero."""
        ahead, acceptance = self._conditions(output, objective, case)
        return torch.minimum(-ahead, acceptance)

    def _conditions(self, output: Tensor, objective: Objective, case: Case) -> tuple[Tensor, Tensor]:
        """Return how far the right class is ahead and the image accepted, in units of its clean distances."""
        logits, acceptance = output[:, :-1], output[:, -1]
        ahead = margin(logits, case.label)
        if objective.targeted:
            ahead = (logits.gather(1, case.label[:, None]) - logits.gather(1, case.aim[:, None])).squeeze(1)
        scale = output.new_ones(len(output), 2) if case.reference is None else case.reference.abs().clamp_min(1e-6)
        return ahead / scale[:, 0], acceptance / scale[:, 1]

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return (output[:, :-1].argmax(1) != case.label) & (output[:, -1] > 0)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return Misclassify().targets(clean_output[:-1], label, n)

    def reference(self, output: Tensor, label: Tensor) -> Tensor:
        return torch.stack([margin(output[:, :-1], label), output[:, -1]], dim=1)


class Deny(Refusable):
    """Rejection of an image that the model accepts."""

    spec, labelled = "deny", False

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return output[:, -1]

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.margin(output, case) <= 0


class Intrude(Refusable):
    """Acceptance of an image that the model rejects, as any class."""

    spec, labelled, unknown = "intrude", False, True

    def margin(self, output: Tensor, case: Case) -> Tensor:
        del case
        return -output[:, -1]


# How these are written, and what they are called


def _misclassify(rest: str, known: Known) -> tuple[Goal, ...]:
    del rest
    return (AcceptedMistake() if known.can_reject else Misclassify(),)


def misclassify_words(can_reject: bool) -> GoalWords:
    if can_reject:
        return GoalWords(
            title="accepted mistakes",
            effect="make the model accept a wrong class on",
            whom="images on which it otherwise makes no accepted mistake",
            before="no accepted mistake when clean",
            held="right or rejected",
            nothing="The model accepted a wrong class on every image before any attack: there was nothing to attack.",
        )
    return GoalWords(
        title="any wrong class",
        effect="make the model wrong on",
        whom="images it otherwise gets right",
        before="right when clean",
        held=ROBUST,
        nothing="The model was wrong on every image before any attack, so there was nothing to attack.",
    )


def _targeted(rest: str, known: Known) -> tuple[Goal, ...]:
    target = _class(rest, known)
    return (Targeted(target, known.class_names[target] if known.class_names else ""),)


def _class(text: str, known: Known) -> int:
    names = known.class_names
    (label,) = places_of([text], names)
    if label is not None:
        return label
    named = [name for name in names if name_key(name) == name_key(text)]
    if named:
        raise UserError(f"'{text}' may be any of {len(named)} classes: write one as it is, '{named[0]}'")
    if text.isascii() and text.isdigit() and (not names or int(text) < len(names)):
        return int(text)
    if not names:
        raise UserError(f"goal 'targeted:{text}' names no class, as the model's have no names: pass the class's number")
    raise UserError(f"'{text}' is none of the {len(names)} classes: {nearest(text, names)}")


def _targeted_words(rest: str, *_: object) -> GoalWords:
    return GoalWords(
        title=f"every image seen as {rest}",
        effect=f"make the model see {rest} in",
        whom="images of other classes in which it otherwise does not",
        before=f"not {rest} when clean",
        held=f"not seen as {rest}",
        nothing=f"The model saw {rest} in every image before any attack, so there was nothing to attack.",
    )


def _deny_words(*_: object) -> GoalWords:
    return GoalWords(
        title="known images rejected",
        effect="make the model reject",
        whom="known images it otherwise accepts",
        before="accepted when clean",
        held="accepted throughout",
        nothing="The model rejected every known image before any attack, so there was nothing to attack.",
    )


def _intrude_words(*_: object) -> GoalWords:
    return GoalWords(
        title="unknown images accepted",
        effect="make the model accept",
        whom="images of unknown classes it otherwise rejects",
        before="rejected when clean",
        held="rejected throughout",
        nothing="The model accepted every unknown image before any attack, so there was nothing to attack.",
        clean="rejected when clean",
    )


_WRONG_ANSWER = GoalWords(
    title="wrong answers",
    effect="make the model answer a wrong class on",
    whom="images on which it otherwise answers no wrong class",
    before="no wrong answer when clean",
    held="right or no answer",
    nothing="The model answered a wrong class on every image before any attack: there was nothing to attack.",
)
_NO_ANSWER = GoalWords(
    title="answers withheld",
    effect="make the model give no answer to",
    whom="known images it otherwise answers",
    before="answered when clean",
    held="answered throughout",
    nothing="The model gave no answer to any known image before any attack, so there was nothing to attack.",
)
_ANY_ANSWER = GoalWords(
    title="unknown images answered",
    effect="make the model answer a class on",
    whom="images of unknown classes it otherwise does not answer",
    before="no answer when clean",
    held="no answer throughout",
    nothing="The model answered every unknown image before any attack, so there was nothing to attack.",
    clean="no answer when clean",
)

GOALS["misclassify"] = GoalKind(
    ("misclassify",),
    _misclassify,
    lambda _, can_reject, __: misclassify_words(can_reject),
    abstaining=_WRONG_ANSWER,
)
GOALS["targeted"] = GoalKind(("targeted:CLASS",), _targeted, _targeted_words, refuses=False)
GOALS["deny"] = GoalKind(("deny",), lambda *_: (Deny(),), _deny_words, refuses=True, abstaining=_NO_ANSWER)
GOALS["intrude"] = GoalKind(("intrude",), lambda *_: (Intrude(),), _intrude_words, refuses=True, abstaining=_ANY_ANSWER)


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

    def tells(self, objective: Objective) -> bool:
        del objective
        return type(self).loss is Superclass.loss

    def outcomes(self, n_classes: int) -> int:
        del n_classes
        return self.n_groups

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
        index = sent(self.groups, output.device).expand(len(output), -1)
        empty = output.new_full((len(output), self.n_groups), float("-inf"))
        return empty.scatter_reduce(1, index, output, reduce="amax")

    def group_of(self, classes: Tensor) -> Tensor:
        """Return the superclasses of classes, int64 [B]."""
        return sent(self.groups, classes.device)[classes]


class SuperclassAll(Goal):
    """One perturbation against all levels at once; reached at the coarsest level, which is wrong at all finer ones.

    The loss is the sum over levels l = 0 (classes) .. L of the objective there, weighted 1 - l / (L + 1)
    (arXiv 2604.18867, the HITA loss's weights). A target of the same superclass says nothing at a level, so the level
    is left out for that image. Attacks that walk along a boundary take that of the coarsest level.

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

    def boundary(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return the objective at the coarsest level, which alone decides: the sum is above zero well before that."""
        return self.levels[-1].loss(output, objective, case)

    def tells(self, objective: Objective) -> bool:
        # At the coarsest level another class of the target's superclass may win, while the target loses at the finest.
        return type(self).loss is SuperclassAll.loss and not objective.targeted

    def outcomes(self, n_classes: int) -> int:
        """Return those of the level with the fewest, the coarsest."""
        return self.levels[-1].outcomes(n_classes)

    def reached(self, output: Tensor, case: Case) -> Tensor:
        return self.levels[-1].reached(output, case)

    def targets(self, clean_output: Tensor, label: int, n: int) -> list[int]:
        return self.levels[-1].targets(clean_output, label, n)


# How these are written, and what they are called; a tree is a `robustvlm.data.trees.Tree`


def levels_of(tree: Any, class_names: Sequence[str]) -> list[tuple[int, Tensor]]:
    """Return the levels of a tree that tell classes apart, with the superclass number of every class, int64 [K]."""
    found = []
    for level in range(tree.levels):
        index = {name: number for number, name in enumerate(tree.level_names(level))}
        if len(index) > 1:
            found.append((level, torch.tensor([index[tree.ancestor(name, level)] for name in class_names])))
    return found


def _read(text: str, known: Known) -> tuple[Goal, ...]:
    tree, prefix, which = _tree(text, known)
    levels = levels_of(tree, known.class_names)
    goals = [Superclass(groups, f"{prefix}{level}") for level, groups in levels]
    universal = SuperclassAll(goals)
    universal.spec = f"superclass:{prefix}all"
    if which == "all":
        return (universal,)
    if which == "matrix":
        return (*goals, universal)
    wanted = _level(which, tree)
    for (level, _), goal in zip(levels, goals, strict=True):
        if level == wanted:
            return (goal,)
    last = levels[-1][0]
    raise UserError(f"level {wanted} of the tree '{tree.root}' has one superclass only: pass a level from 0 to {last}")


def _tree(text: str, known: Known) -> tuple[Any, str, str]:
    if known.trees is None and known.data is None:
        raise UserError("superclass goals need a class tree: pass robustvlm.attacks.Superclass(groups, level)")
    if known.trees is None:
        advice = f"pass {setting('tree', 'FILE')}"
        raise UserError(f"the data '{known.data}' has no class tree, which superclass goals need: {advice}")
    root, slash, which = text.rpartition("/")
    if slash:
        return known.trees[root], f"{root}/", which
    return known.trees[0], "", which


def _level(text: str, tree: Any) -> int:
    """Return the level of a number or of the name of a superclass that stands in it."""
    if text.lstrip("-").isdigit():
        level = int(text)
        if not 0 <= level < tree.levels - 1:
            last = tree.levels - 2
            raise UserError(f"the tree '{tree.root}' has levels 0 (classes) to {last} below its root, got {level}")
        return level
    for level in range(tree.levels):
        if name_key(text) in map(name_key, tree.level_names(level)):
            return level
    words = {name for level in range(1, tree.levels - 1) for name in tree.level_names(level)}
    raise UserError(
        f"'{text}' is no level of the tree '{tree.root}': pass a number from 0 to {tree.levels - 2}, a superclass of "
        f"the level, all or matrix; {nearest(text, words | {'all', 'matrix'})}"
    )


def _words(rest: str, can_reject: bool, min_cos: float | None) -> GoalWords:
    del min_cos
    which = rest.rpartition("/")[2]
    if which == "matrix":  # several goals: the counts by attack are of the classes
        return replace(misclassify_words(can_reject), leave=False)
    where = "of the coarsest level, with one perturbation against all levels," if which == "all" else f"(level {rest})"
    return GoalWords(
        title="a wrong superclass " + ("at all levels, by one perturbation" if which == "all" else f"at level {rest}"),
        effect=f"move the prediction out of the right superclass {where} on",
        whom="images whose superclass it otherwise gets right",
        before="superclass right when clean",
        held="robust superclass accuracy",
        nothing="The model missed the superclass of every image before any attack, so there was nothing to attack.",
    )


GOALS["superclass"] = GoalKind(
    ("superclass:LEVEL", "superclass:all", "superclass:matrix"), _read, _words, refuses=False
)

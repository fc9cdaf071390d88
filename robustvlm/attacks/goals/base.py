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
| `say:TEXT`         | image tokens          | the greedy answer of the language model is TEXT                       |
| `unsay`            | image tokens          | the greedy answer does not name the class any more                    |
| `match:FILE.png`   | image tokens          | the greedy answer is what the model says of that picture              |
| `reword`           | image tokens          | the greedy answer means something else than the clean one             |

A model that may refuse returns one column more than there are classes: the acceptance score, positive when the image
is accepted. Every goal is a margin that is positive until the goal is reached, so attacks, best iterates and verdicts
work alike for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustvlm.attacks.objectives import Objective
from robustvlm.core import registry
from robustvlm.core.registry import Table
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
        still_at_image: the gradient vanishes at the clean image, so that attacks must start elsewhere.
        leave: an image leaves at its first success; otherwise every attack goes on to the end of its budget.
        labelled: it has to know the true class of an image.
        unknown: it is about images of unknown classes, instead of those of known ones.
        of_features: the output is unit features, not logits.
        of_tokens: they are image tokens [B, T * D] for a language model, as it reads them.
        cropped: behind them stand those of a crop of the image (`goals.matching.crop`), [B, 2 * T * D].
        refers: it has to know more of a clean image than its label and target (see `reference`).
    """

    spec: str
    still_at_image: bool = False
    leave: bool = True
    labelled: bool = True
    unknown: bool = False
    of_features: bool = False
    of_tokens: bool = False
    cropped: bool = False
    refers: bool = False

    @abstractmethod
    def margin(self, output: Tensor, case: Case) -> Tensor:
        """Return [B] numbers, positive as long as the goal is not reached; the smaller, the nearer."""

    def loss(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return what an attack with this objective maximises, [B]; goals without classes to tell apart: -margin."""
        del objective
        return -self.margin(output, case)

    def boundary(self, output: Tensor, objective: Objective, case: Case) -> Tensor:
        """Return what attacks maximise that walk along a boundary, [B]: above zero where the goal is reached, only.

        The loss, unless its sign does not tell that; where it does not and no boundary is known (`match`, `reword`, and
        `unsay` by features), such attacks walk along another and find less. An objective contributes its choice of
        class.
        """
        return self.loss(output, objective, case)

    def tells(self, objective: Objective) -> bool:
        """Whether the loss is above zero wherever the goal is reached, for an objective whose sign tells success.

        Otherwise no attack may judge by its loss how far the goal still is, and all go on to the end of their budget.
        """
        del objective
        return type(self).loss is Goal.loss

    def outcomes(self, n_classes: int) -> int:
        """Return how many outcomes objectives tell apart where the model has `n_classes`."""
        return n_classes

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

    def reference(self, output: Tensor, label: Tensor) -> Tensor | None:
        """Return what the goal has to know of clean images, [B, R], from their outputs and labels; None for nothing."""
        del output, label
        return None


# What a kind of goal is called in plain words


CLEAN, ROBUST = "clean accuracy", "robust accuracy"


@dataclass(frozen=True)
class GoalWords:
    """The words of one goal.

    Args:
        title: what the attacker wants, for headings.
        effect: what a perturbation does, before "on 5 of the images": "make the model wrong on".
        whom: the images that can be attacked, after "the" or a number: "images it otherwise gets right".
        before: the same as a column title: "right when clean".
        held: name of the share of images on which the goal is not reached: "robust accuracy".
        nothing: what to say when the goal was reached on every image before any attack.
        clean: name of the share of images that were right before any attack.
        leave: images leave at the first success, so that later attacks see only those left standing.
    """

    title: str
    effect: str
    whom: str
    before: str
    held: str
    nothing: str
    clean: str = CLEAN
    leave: bool = True

    @property
    def accuracy(self) -> bool:
        """Whether the share of images on which the goal is not reached is an accuracy."""
        return self.held == ROBUST

    @property
    def caption(self) -> str:
        """Say what the two rates of a run are shares of."""
        held = self.held[0].upper() + self.held[1:]
        return f"{held}: over all images. Attack success rate: over the {self.whom}."


# A kind of goal by the word that it is written with: each file of this package adds its own to the table


@dataclass(frozen=True)
class Known:
    """What goals can be read from: what is known of a model and its data.

    Args:
        model: the spec of the model, None where it has none.
        class_names: the classes; none where only their numbers are known.
        can_reject: the model may refuse.
        embeddings, head: unit features [K, D] of the classes' texts, and weights [K, D] that turn features into logits.
        feature_of: from a text, or the path of a picture, to its unit feature [D] and whether it was a picture.
        speech: a language model that answers about the images (`goals.words.Speech`), None where there is none.
        tokens_of: from the path of a picture to the image tokens [N, T * D] that it reads: a row, or rows of N draws.
        sentences: loads an encoder of sentences, from N texts to unit vectors [N, E].
        trees: class trees (`robustvlm.data.trees.Forest`), None where there are none; data: where they would stand.
        min_cos: the threshold of the goal `feature`.
    """

    model: str | None = None
    class_names: Sequence[str] = ()
    can_reject: bool = False
    embeddings: Tensor | None = field(default=None, repr=False)
    head: Tensor | None = field(default=None, repr=False)
    feature_of: Callable[[str], tuple[Tensor, bool]] | None = None
    speech: Any = None
    tokens_of: Callable[[str], Tensor] | None = None
    sentences: Callable[[], Callable[[Sequence[str]], Tensor]] | None = None
    trees: Any = None
    data: str | None = None
    min_cos: float = 0.5

    @classmethod
    def of_model(cls, model: Any) -> Known:
        """Return what a model says of itself: `class_names`, `can_reject`, `class_embeddings` with `logit_scale`.

        Other people's models may have any of these, or none.
        """
        embeddings, scale = getattr(model, "class_embeddings", None), getattr(model, "logit_scale", None)
        return cls(
            getattr(model, "spec", None),
            tuple(getattr(model, "class_names", ())),
            bool(getattr(model, "can_reject", False)),
            head=(scale * embeddings).detach() if isinstance(embeddings, Tensor) and scale is not None else None,
        )


@dataclass(frozen=True)
class GoalKind:
    """How goals of one kind are written, read and spoken of.

    Args:
        forms: how they are written, each the kind itself or "kind:WHAT".
        read: from what follows the kind, and what is known, to the goals: mostly one.
        words: from what follows the kind, whether the model may refuse, and the threshold of cosines, to the words.
        refuses: True: for models that may refuse; False: for those that never do; None: for both.
        abstaining: the words where what such a model does is no refusal: its copies do not decide the class.
    """

    forms: tuple[str, ...]
    read: Callable[[str, Known], tuple[Goal, ...]]
    words: Callable[[str, bool, float | None], GoalWords]
    refuses: bool | None = None
    abstaining: GoalWords | None = None


GOALS: Table[GoalKind] = Table(__package__)
"""Every kind of goal by the word that it is written with; a file of this package adds its own."""


def split_goal(text: str) -> tuple[str, str]:
    """Split `KIND[:REST]`, where a user's own kind is `module:callable`, and refuse what no model could make right.

    Example:
        >>> split_goal("superclass:all"), split_goal("feature")
        (('superclass', 'all'), ('feature', ''))
    """
    text = str(text).strip()
    kind, colon, rest = text.partition(":")
    if kind not in GOALS:
        own = own_spec(text)
        if registry.names_own(own):
            return own, text[len(own) + 1 :]
        all_forms = ", ".join(form for known in GOALS.values() for form in known.forms)
        hint = f"{nearest(kind, GOALS)} (forms: {all_forms}, or your own MODULE:CALLABLE)"
        raise UserError(f"unknown goal '{text}': {hint}")
    forms = GOALS[kind].forms
    if not rest.strip() and kind not in forms:
        raise UserError(f"the goal '{text}' says not which one: pass {' or '.join(forms)}")
    if colon and (not rest.strip() or forms == (kind,)):
        raise UserError(f"unknown goal '{text}': pass {' or '.join(forms)}")
    return kind, rest.strip()


def own_spec(text: str) -> str:
    """Return the `module:callable` at the head of a goal's text.

    Example:
        >>> own_spec("my.goals:Below:0.5")
        'my.goals:Below'
    """
    return ":".join(text.strip().split(":")[:2])


def read_goals(text: str, known: Known) -> tuple[Goal, ...]:
    """Return the goals that a text stands for: one, but for `superclass:matrix`.

    Raises:
        UserError: an unknown kind or class or level, or a goal that the model does not allow.

    Example:
        >>> [goal.spec for goal in read_goals("targeted:Dog", Known(class_names=["cat", "dog"]))]
        ['targeted:dog']
    """
    kind, rest = split_goal(text)
    found = GOALS[kind] if kind in GOALS else _own_kind(kind)
    if found.refuses is True and not known.can_reject:
        who, example = f"'{known.model}'" if known.model else "this one", f"{known.model or 'MODEL'}+reject:0.5"
        raise UserError(
            f"the goal {kind} needs a model that may refuse, and {who} never does: pass for example '{example}'"
        )
    if found.refuses is False and known.can_reject:
        advice = f"attack '{known.model}' without refusal" if known.model else "attack it without its refusal"
        raise UserError(f"the goal {kind} is for models that never refuse: {advice}")
    return found.read(rest, known)


def goal_words(
    text: str, *, can_reject: bool = False, min_cos: float | None = None, abstains: bool = False
) -> GoalWords:
    """Return the words of a goal as written on the command line, also of one that is not there any more.

    Args:
        can_reject: the model may refuse; abstains: and does so where its copies do not decide.

    Example:
        >>> goal_words("deny", can_reject=True).effect
        'make the model reject'
    """
    kind, _, rest = text.partition(":")
    withheld = GOALS[kind].abstaining if kind in GOALS and abstains else None
    if withheld is not None:
        return withheld
    return GOALS[kind].words(rest, can_reject, min_cos) if kind in GOALS else _own_words(text)


# Goals of the user's, by `module:callable`


def _own_kind(spec: str) -> GoalKind:
    return GoalKind(
        (spec,), lambda rest, known: _own_goals(spec, rest, known), lambda *_: _own_words(spec), refuses=False
    )


def _own_goals(spec: str, rest: str, known: Known) -> tuple[Goal, ...]:
    """Return a user's goal, made from the class names and what follows in its text, after a trial."""
    given = (tuple(known.class_names), *([rest] if rest else []))
    made = registry.call(spec, registry.resolve(spec), "a goal", *given)
    goal: Goal = registry.expect(spec, made, Goal, "a goal", ("margin",))
    logits = torch.linspace(-1, 1, 2 * len(known.class_names)).view(2, -1).sin().requires_grad_(True)
    case = Case(torch.tensor([0, 0]))
    margin = registry.call(spec, goal.margin, "a margin", logits, case)
    wanted = f"'{spec}': margin of outputs {list(logits.shape)} must return finite numbers [2] with a gradient"
    if not isinstance(margin, Tensor) or margin.shape != (2,) or not margin.requires_grad:
        raise UserError(f"{wanted}, got {f'shape {list(margin.shape)}' if isinstance(margin, Tensor) else margin!r}")
    alone = goal.margin(logits[:1], case.rows(torch.tensor([0])))
    if not margin.isfinite().all() or not torch.allclose(margin[:1], alone):
        raise UserError(f"{wanted}, each from its own row alone; got {margin.tolist()}")
    object.__setattr__(goal, "spec", f"{spec}:{rest}" if rest else spec)
    return (goal,)


def _own_words(text: str) -> GoalWords:
    """Return the words of a goal of the user's, which is known by its name alone."""
    return GoalWords(
        title=f"the goal {text}",
        effect=f"reach the goal {text} on",
        whom="images on which it is not reached otherwise",
        before="not reached when clean",
        held="goal not reached",
        nothing=f"The goal {text} was reached on every image before any attack, so there was nothing to attack.",
        clean="not reached when clean",
    )

"""What each goal is called, and what its numbers mean, in words."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    clean: str = "clean accuracy"
    leave: bool = True

    @property
    def accuracy(self) -> bool:
        """Whether the share of images on which the goal is not reached is an accuracy."""
        return self.held == "robust accuracy"

    @property
    def caption(self) -> str:
        """Say what the two rates of a run are shares of."""
        held = self.held[0].upper() + self.held[1:]
        return f"{held}: over all images. Attack success rate: over the {self.whom}."


def goal_words(goal: str, *, can_reject: bool = False, min_cos: float | None = None) -> GoalWords:
    """Return the words of a goal as written on the command line.

    Example:
        >>> goal_words("deny", can_reject=True).effect
        'make the model reject'
    """
    kind, _, rest = goal.partition(":")
    which = rest.rpartition("/")[2]
    if kind == "superclass" and which != "matrix":
        return _superclass(which, rest)
    if kind == "targeted":
        return GoalWords(
            title=f"every image seen as {rest}",
            effect=f"make the model see {rest} in",
            whom="images of other classes in which it otherwise does not",
            before=f"not {rest} when clean",
            held=f"not seen as {rest}",
            nothing=f"The model saw {rest} in every image before any attack, so there was nothing to attack.",
        )
    if kind == "deny":
        return GoalWords(
            title="known images rejected",
            effect="make the model reject",
            whom="known images it otherwise accepts",
            before="accepted when clean",
            held="accepted throughout",
            nothing="The model rejected every known image before any attack, so there was nothing to attack.",
        )
    if kind == "intrude":
        return GoalWords(
            title="unknown images accepted",
            effect="make the model accept",
            whom="images of unknown classes it otherwise rejects",
            before="rejected when clean",
            held="rejected throughout",
            nothing="The model accepted every unknown image before any attack, so there was nothing to attack.",
            clean="rejected when clean",
        )
    if kind == "feature":
        return _feature(rest, min_cos)
    if kind not in ("misclassify", "superclass"):
        return _own(goal)
    return replace(_misclassify(can_reject), leave=kind != "superclass")


def _own(goal: str) -> GoalWords:
    """Return the words of a goal of the user's, which is known by its name alone."""
    return GoalWords(
        title=f"the goal {goal}",
        effect=f"reach the goal {goal} on",
        whom="images on which it is not reached otherwise",
        before="not reached when clean",
        held="goal not reached",
        nothing=f"The goal {goal} was reached on every image before any attack, so there was nothing to attack.",
        clean="not reached when clean",
    )


def _misclassify(can_reject: bool) -> GoalWords:
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
        held="robust accuracy",
        nothing="The model was wrong on every image before any attack, so there was nothing to attack.",
    )


def _superclass(which: str, rest: str) -> GoalWords:
    where = "of the coarsest level, with one perturbation against all levels," if which == "all" else f"(level {rest})"
    return GoalWords(
        title="a wrong superclass " + ("at all levels, by one perturbation" if which == "all" else f"at level {rest}"),
        effect=f"move the prediction out of the right superclass {where} on",
        whom="images whose superclass it otherwise gets right",
        before="superclass right when clean",
        held="robust superclass accuracy",
        nothing="The model missed the superclass of every image before any attack, so there was nothing to attack.",
    )


def _feature(target: str, min_cos: float | None) -> GoalWords:
    if target:
        return GoalWords(
            title=f"features moved to {target}",
            effect=f"move the feature to {target}, past the rival it starts from, on",
            whom="images whose feature was not there before",
            before="not there when clean",
            held="nearer to the rival",
            nothing=f"The feature of every image was at {target} before any attack, so there was nothing to attack.",
            leave=False,
        )
    below = f"below {min_cos:g}" if min_cos is not None else "below the threshold"
    return GoalWords(
        title="features moved away from the clean ones",
        effect=f"push the cosine to the clean feature {below} on",
        whom="images",
        before="images",
        held=f"cosine not {below}",
        nothing="The features of all images were away from themselves before any attack: the model is random.",
        leave=False,
    )

"""The content of an attack's `summary.json`, made from its rows in one place, and the conditions put to it."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from robustvlm.commands.attack import verdicts
from robustvlm.errors import UserError, nearest
from robustvlm.runs.records import Check, Comparison, Cost, Drawn, Estimate, Record, UnreadableImage, parse_comparison
from robustvlm.stats import Mean, Rate, mean, worth_of


class Images(Record):
    """How many images were evaluated, could not be read, and were classified right unperturbed.

    `exposed` are those on which the goal was not reached unperturbed (None in runs from before there were goals: the
    ones classified right); `left_out` those that the goal is not about, such as images of unknown classes; `waiting`
    those that a run which stopped early has not classified yet; `uncounted`: there may be more of them, in a stream of
    unknown length, so that no rate is known. `worth` is how many independent images those evaluated are worth, where
    copies of one thing are among them: intervals are those of so many. None in runs whose intervals count every image.
    `worth_in_all` is the same with those that wait.
    """

    evaluated: int
    unreadable: int
    clean_correct: int
    exposed: int | None = None
    left_out: int = 0
    waiting: int = 0
    uncounted: bool = False
    worth: float | None = None
    worth_in_all: float | None = None


class AttackSummary(Record):
    """One attack at one eps: images it ran on, fooled, broke on; accuracy left after it and all stages before it.

    `robust_accuracy_after_at_most` is that accuracy if all images that are undecided so far were robust. `passes` are
    those of the images it finished.
    """

    attack: str
    attacked: int
    fooled: int
    failed: int
    robust_accuracy_after: Rate
    robust_accuracy_after_at_most: Rate | None = None
    steps: int
    passes: int


class GroupSummary(Record):
    """A class or superclass at one eps; the rate is over its images that were right when clean and decided.

    With `undecided` images the success rate over all that were right when clean lies between `fooled` and
    `fooled + undecided` of them.
    """

    name: str
    images: int
    clean_correct: int
    fooled: int
    undecided: int = 0
    attack_success_rate: Rate


class Cosine(Record):
    """The cosine that a feature goal is about, as means over the images: unperturbed, and at the worst point found.

    For `feature` it is the similarity to the image's own clean feature (FCS), for `feature:TARGET` that to the target.
    """

    clean: Mean
    attacked: Mean


class Acceptance(Record):
    """How many images a model that may refuse accepted and rejected, unperturbed and at the recorded points."""

    clean_accepted: int
    clean_rejected: int
    accepted: int
    rejected: int


class EpsSummary(Record):
    """The worst case over the attacks at one eps.

    `robust_accuracy` is over all evaluated images: the share on which the goal was reached neither unperturbed nor by
    an attack, which for `misclassify` is accuracy. `attack_success_rate` is over the images on which the goal was not
    reached unperturbed: for `misclassify` those right when clean. Images on which
    an attack broke and none succeeded, or that a stopped run has not come to (`undecided`), count as not robust, and
    are left out of the success rate. `robust_accuracy_at_most` is the robust accuracy if all of them were robust; the
    bounds of the success rate are what it is if none of them falls, and if all do.
    """

    eps: float
    eps_text: str
    fooled: int
    robust: int
    undecided: int
    robust_accuracy: Rate
    robust_accuracy_at_most: Rate | None = None
    attack_success_rate: Rate
    attack_success_rate_at_least: Rate | None = None
    attack_success_rate_at_most: Rate | None = None
    per_attack: list[AttackSummary]
    per_class: list[GroupSummary]
    per_superclass: list[GroupSummary]
    levels: list[verdicts.LevelSummary] = []  # noqa: RUF012 (pydantic gives every record its own)
    transfer: verdicts.LevelTransfer | None = None
    cosine: Cosine | None = None
    acceptance: Acceptance | None = None


class Summary(Record):
    """Everything that tables, reports and exit codes are made of.

    Args:
        can_reject: the model may refuse; abstains: and its refusals are answers withheld, as copies do not decide.
        says_classes: the goal looks at something that names classes; where none is named, `clean_accuracy` counts the
            images on which the goal is not reached, and nothing is said of levels.
        clean_accuracy: over the images classified and, as wrong ones, those that still wait to be.
        clean_accuracy_at_most: the same if all that wait were right; None when none waits.
        unfinished: why the run stopped before every image was decided; None when all are.
        estimate: what the attacks were expected to cost before the first of them.
        drawn: how the model was asked where it is random; None where it is not.
    """

    norm: str
    goal: str = "misclassify"
    min_cos: float | None = None
    can_reject: bool = False
    abstains: bool = False
    says_classes: bool = True
    images: Images
    clean_accuracy: Rate
    clean_accuracy_at_most: Rate | None = None
    per_eps: list[EpsSummary]
    cost: Cost
    checks: list[Check]
    unreadable: list[UnreadableImage]
    unfinished: str | None = None
    estimate: Estimate | None = None
    drawn: Drawn | None = None

    def at(self, eps: str | float) -> EpsSummary:
        """Return the part at one radius, given as it was when the run was made, or as a number.

        Raises:
            UserError: the run has no such radius.
        """
        for point in self.per_eps:
            if eps == point.eps_text if isinstance(eps, str) else math.isclose(eps, point.eps, rel_tol=1e-12):
                return point
        raise UserError(f"the run has no eps '{eps}': {nearest(str(eps), [point.eps_text for point in self.per_eps])}")


# The content of `summary.json`: the one place where a run's rows become the numbers that are shown


def summarise(
    rows: verdicts.Rows,
    manifest: Mapping[str, Any],
    *,
    cost: Cost | None = None,
    checks: Sequence[Check] = (),
    unreadable: Sequence[UnreadableImage] = (),
    left_out: int = 0,
    waiting: int = 0,
    uncounted: bool = False,
    unfinished: str | None = None,
    estimate: Estimate | None = None,
    drawn: Drawn | None = None,
    group: Callable[[str], str] = str,
    awaited: Sequence[str] | None = None,
) -> Summary:
    """Return the summary of result rows (an Arrow table or a list of dicts) under their manifest.

    Every rate has its exact 95 % interval, in which images of one `group`, by their ids, count once. Classes without an
    image are left out. `waiting` images are not classified yet: they count as wrong, and as right in what rates are at
    most; `awaited` are their groups, as in `Verdicts`.

    Example:
        >>> manifest = {"config": {"norm": "Linf", "eps": [0.1], "eps_text": ["0.1"], "attack": ["pgd"]},
        ...             "data": {"class_names": ["cat", "dog"], "superclasses": None}}
        >>> row = {"index": 0, "image_id": "a", "label": 1, "clean_prediction": 1, "attack": "pgd", "eps": 0.1,
        ...        "outcome": "fooled", "steps": 3, "passes": 4}
        >>> summarise([row], manifest).per_eps[0].attack_success_rate.value
        1.0
    """
    config = manifest["config"]
    goals = config.get("goals") or ["misclassify"]
    of_goal = partial(
        verdicts.verdicts,
        rows,
        eps=config["eps"],
        attacks=config["attack"],
        group=group,
        waiting=waiting,
        awaited=awaited,
    )
    table = of_goal(goal=goals[0])
    texts = dict(zip(map(float, config["eps"]), config["eps_text"], strict=True))
    work = _work(rows, goals[0])
    can_reject = bool((manifest.get("model") or {}).get("can_reject"))
    says_classes = can_reject or not table.classless
    correct = sum(image.clean_correct if says_classes else image.exposed for image in table.images)
    return Summary(
        norm=config["norm"],
        goal=config.get("goal") or "misclassify",
        min_cos=config.get("min_cos") if goals[0] == "feature" else None,
        can_reject=can_reject,
        abstains=bool((manifest.get("model") or {}).get("abstains")),
        says_classes=says_classes,
        images=Images(
            evaluated=len(table.images),
            unreadable=len(unreadable),
            clean_correct=correct,
            exposed=sum(image.exposed for image in table.images),
            left_out=left_out,
            waiting=waiting,
            uncounted=uncounted,
            worth=worth_of(image.group for image in table.images),
            worth_in_all=worth_of([*(image.group for image in table.images), *table.awaited]),
        ),
        clean_accuracy=table.share(correct),
        clean_accuracy_at_most=table.share(correct + waiting) if waiting else None,
        per_eps=[
            _at_eps(
                table,
                i,
                text=texts.get(eps, f"{eps:g}"),
                work=work,
                rows=rows,
                manifest=manifest,
                of_goal=lambda goal: of_goal(goal=goal),
            )
            for i, eps in enumerate(table.eps)
        ],
        cost=cost or Cost(),
        checks=list(checks),
        unreadable=list(unreadable),
        unfinished=unfinished,
        estimate=estimate,
        drawn=drawn,
    )


def _work(rows: verdicts.Rows, goal: str) -> dict[tuple[float, str], Counter[str]]:
    """Count, per eps and attack, the goal's rows of each outcome and the steps and passes they took."""
    work: dict[tuple[float, str], Counter[str]] = defaultdict(Counter)
    fields = verdicts.columns(rows, "eps", "attack", "goal", "outcome", "steps", "passes")
    for eps, attack, of, outcome, steps, passes in fields:
        if of == goal:
            work[float(eps), attack].update({outcome: 1, "steps": steps, "passes": passes})
    return work


def _at_eps(
    table: verdicts.Verdicts,
    index: int,
    *,
    text: str,
    work: Mapping[tuple[float, str], Counter[str]],
    rows: verdicts.Rows,
    manifest: Mapping[str, Any],
    of_goal: Callable[[str], verdicts.Verdicts],
) -> EpsSummary:
    data, config = manifest["data"], manifest["config"]
    goals = config.get("goals") or ["misclassify"]
    named = not table.classless and any(image.label >= 0 for image in table.images)
    levels = verdicts.tree_levels(data) if named else []
    outcomes = [(image, table.after(image, index)) for image in table.images]
    count = Counter(outcome for _, outcome in outcomes)
    undecided = count["undecided"] + table.waiting
    attacked = [image for image, outcome in outcomes if outcome != "clean_wrong"]
    features = goals[0].startswith("feature")
    # Feature goals look at the encoder, below any refusal.
    refuses = bool((manifest.get("model") or {}).get("can_reject")) and not features
    recorded = verdicts.worst_points(rows, goals[0], table.eps[index]) if refuses or features else []
    names: list[str] = data["class_names"]
    superclasses: Mapping[str, str] = data.get("superclasses") or {}
    return EpsSummary(
        eps=table.eps[index],
        eps_text=text,
        fooled=count["fooled"],
        robust=count["robust"],
        undecided=undecided,
        robust_accuracy=table.share(count["robust"]),
        robust_accuracy_at_most=table.share(count["robust"] + undecided),
        attack_success_rate=_success_rate(table, outcomes),
        attack_success_rate_at_least=table.share(count["fooled"], attacked),
        attack_success_rate_at_most=table.share(count["fooled"] + undecided, attacked),
        per_attack=[_attack(table, index, j, work[table.eps[index], name]) for j, name in enumerate(table.attacks)],
        per_class=_groups(table, outcomes, lambda image: names[image.label] if image.label >= 0 else None),
        per_superclass=_groups(
            table, outcomes, lambda image: superclasses.get(names[image.label]) if image.label >= 0 else None
        ),
        levels=verdicts.level_summaries(rows, table, index, levels) if len(goals) == 1 else [],
        transfer=verdicts.level_transfer(rows, goals, index, levels, of_goal) if len(goals) > 1 and levels else None,
        cosine=_cosine(recorded, table) if features else None,
        acceptance=_acceptance(recorded) if refuses else None,
    )


def _cosine(recorded: Sequence[verdicts.Point], table: verdicts.Verdicts) -> Cosine | None:
    known = [point for point in recorded if point.cosine is not None and math.isfinite(point.cosine)]
    if not known:
        return None
    clean, attacked = ([p.clean_cosine for p in known], [p.cosine for p in known])
    group = {image.image_id: image.group for image in table.images}
    worth = worth_of(group[point.image_id] for point in known)
    return Cosine(
        clean=mean(clean, within=(-1.0, 1.0), independent=worth),
        attacked=mean(attacked, within=(-1.0, 1.0), independent=worth),
    )


def _acceptance(recorded: Sequence[verdicts.Point]) -> Acceptance:
    clean = Counter(
        point.clean_prediction == verdicts.REJECTED
        for point in recorded
        if point.clean_prediction != verdicts.NO_ANSWER
    )
    after = Counter(
        point.prediction == verdicts.REJECTED for point in recorded if point.prediction != verdicts.NO_ANSWER
    )
    return Acceptance(
        clean_accepted=clean[False], clean_rejected=clean[True], accepted=after[False], rejected=after[True]
    )


def _attack(table: verdicts.Verdicts, eps_index: int, attack_index: int, done: Counter[str]) -> AttackSummary:
    after = Counter(table.after(image, eps_index, attack_index) for image in table.images)
    held = after["robust"]
    return AttackSummary(
        attack=table.attacks[attack_index],
        attacked=done["fooled"] + done["robust"] + done["failed"],
        fooled=done["fooled"],
        failed=done["failed"],
        robust_accuracy_after=table.share(held),
        robust_accuracy_after_at_most=table.share(held + after["undecided"] + table.waiting),
        steps=done["steps"],
        passes=done["passes"],
    )


_Outcomes = Sequence[tuple[verdicts.ImageVerdict, verdicts.Outcome]]


def _groups(
    table: verdicts.Verdicts, outcomes: _Outcomes, name_of: Callable[[verdicts.ImageVerdict], str | None]
) -> list[GroupSummary]:
    """Summarise the images of each name, names in alphabetical order; images without a name are left out."""
    members: dict[str, list[tuple[verdicts.ImageVerdict, verdicts.Outcome]]] = defaultdict(list)
    for image, outcome in outcomes:
        name = name_of(image)
        if name is not None:
            members[name].append((image, outcome))
    return [_group(table, name, members[name]) for name in sorted(members)]


def _group(table: verdicts.Verdicts, name: str, outcomes: _Outcomes) -> GroupSummary:
    count = Counter(outcome for _, outcome in outcomes)
    return GroupSummary(
        name=name,
        images=len(outcomes),
        clean_correct=len(outcomes) - count["clean_wrong"],
        fooled=count["fooled"],
        undecided=count["undecided"],
        attack_success_rate=_success_rate(table, outcomes),
    )


def _success_rate(table: verdicts.Verdicts, outcomes: _Outcomes) -> Rate:
    decided = [(image, outcome) for image, outcome in outcomes if outcome in ("fooled", "robust")]
    fooled = sum(outcome == "fooled" for _, outcome in decided)
    return table.share(fooled, [image for image, _ in decided], waiting=False)


# Conditions on an attack summary, such as `asr>0.5`, that decide the exit code of a run in continuous integration

_LEFT = re.compile(r"[a-z_]+")
_RATES = ("asr", "robust_accuracy", "clean_accuracy")


@dataclass(frozen=True)
class Condition:
    """A comparison of a rate, or of an end of its interval, with a threshold.

    Example:
        >>> parse_condition("asr.low > 50%").comparison.threshold
        0.5
    """

    comparison: Comparison

    @property
    def text(self) -> str:
        """The condition as it was written."""
        return self.comparison.text

    def holds(self, summary: Summary) -> bool:
        """Whether the condition is true at any eps of the run; of a rate over no images every condition is.

        What is undecided (a run stopped early, an attack broke) is counted both ways: a gate that nobody could check
        must not open. Of a stream whose images nobody has counted, every condition holds until all are classified.
        """
        if summary.images.uncounted:
            return True
        points: list[EpsSummary | None] = list(summary.per_eps) or [None]
        return any(self.comparison.holds_for(found) for point in points for found in self._rates(summary, point))

    def _rates(self, summary: Summary, point: EpsSummary | None) -> list[Rate | None]:
        """Return the rate that is meant, and what it is at least and at most where something is undecided."""
        if self.comparison.left == "clean_accuracy":
            return [summary.clean_accuracy, summary.clean_accuracy_at_most or summary.clean_accuracy]
        if point is None:
            return [None]
        if self.comparison.left == "robust_accuracy":
            return [point.robust_accuracy, point.robust_accuracy_at_most or point.robust_accuracy]
        bounds = (point.attack_success_rate_at_least, point.attack_success_rate_at_most)
        return [point.attack_success_rate, *(bound for bound in bounds if bound is not None and point.undecided)]


def parse_condition(text: str) -> Condition:
    """Return the condition of a text `RATE[.low|.high] (>|<|>=|<=) NUMBER[%]`, or raise a UserError that shows one."""
    found = parse_comparison(text, _LEFT, example="asr>0.5 or robust_accuracy.low<30%")
    if found.left not in _RATES:
        raise UserError(f"unknown rate '{found.left}' in the condition '{text}': {nearest(found.left, _RATES)}")
    found.require_share()
    return Condition(found)

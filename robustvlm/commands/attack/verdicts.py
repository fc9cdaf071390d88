"""From result rows to one verdict per image and eps, and to accuracies at every level of a class tree."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from robustvlm.runs.records import Record
from robustvlm.stats import Rate, rate, worth_of

# From result rows to one verdict per image and eps: the worst case over every attack that was run

Rows: TypeAlias = pa.Table | Sequence[Mapping[str, Any]]
# Predictions that are no class: the image was rejected; there is no answer (not finite, or not attacked).
REJECTED, NO_ANSWER = -1, -2

Outcome = Literal["clean_wrong", "fooled", "robust", "undecided"]


@dataclass(frozen=True)
class ImageVerdict:
    """One image: what the model said of it unperturbed, and the first stage of the attack that fooled it.

    A stage is one attack at one eps; stages are numbered by rising eps, then by the order of the attacks. `fell` is the
    stage that fooled the image (None: no stage did), `held` the stages that ran to their end without success. An image
    is not `exposed` when the goal was reached without any perturbation. Images of one `group` are copies of one thing.
    """

    index: int
    image_id: str
    label: int
    clean_prediction: int
    exposed: bool
    fell: int | None
    held: frozenset[int]
    group: str

    @property
    def clean_correct(self) -> bool:
        """Whether the unperturbed image was classified right; of an unknown class: whether it was rejected."""
        return self.clean_prediction == self.label


@dataclass(frozen=True)
class Verdicts:
    """All images of a run, with the eps (rising) and attacks (in order) that number the stages.

    `waiting` images more are not classified yet; `awaited` is what they are copies of, as far as it adds to what is
    known: nothing of those of which nobody can say whether they are copies.
    """

    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    images: tuple[ImageVerdict, ...]
    waiting: int = 0
    awaited: tuple[str, ...] = ()

    @property
    def classless(self) -> bool:
        """Whether no class is named for any image, as by goals about features or words where nothing names one."""
        return bool(self.images) and all(image.clean_prediction == REJECTED for image in self.images)

    def share(self, hits: int, among: Collection[ImageVerdict] | None = None, *, waiting: bool = True) -> Rate:
        """Return the share `hits` of some images (None: of all), and of those that wait, unless they are left out.

        Its interval counts copies of one thing once.
        """
        among = self.images if among is None else among
        groups = [image.group for image in among] + [*self.awaited] * waiting
        # Images that may all be copies of one thing are worth one.
        return rate(hits, len(among) + self.waiting * waiting, independent=max(1.0, worth_of(groups)))

    def after(self, image: ImageVerdict, eps_index: int, attack_index: int | None = None) -> Outcome:
        """Return the verdict at `eps[eps_index]` after the attacks up to `attack_index` (None: after all of them).

        A perturbation inside a small ball is inside every larger one, so an image that fell at a smaller eps has
        fallen here too. "clean_wrong": the goal was reached unperturbed. "undecided": neither that nor fooled, and
        some attack broke or has no answer, so that nothing is known.
        """
        if not image.exposed:
            return "clean_wrong"
        last = len(self.attacks) - 1 if attack_index is None else attack_index
        begin = eps_index * len(self.attacks)
        if image.fell is not None and image.fell <= begin + last:
            return "fooled"
        needed = range(begin, begin + last + 1)
        return "robust" if needed and all(stage in image.held for stage in needed) else "undecided"


# What the rows of runs from before there were goals lack, and what it was then.
DEFAULTS: Mapping[str, Any] = {"goal": "misclassify", "cosine": None, "clean_cosine": None}


def columns(rows: Rows, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the named values of each row, from an Arrow table or a list of dicts.

    Example:
        >>> list(columns([{"a": 1, "b": 2, "c": 3}], "a", "c"))
        [(1, 3)]
    """
    if isinstance(rows, pa.Table):
        known = set(rows.column_names)
        parts = [
            rows.column(name).to_pylist() if name in known or name not in DEFAULTS else [DEFAULTS[name]] * len(rows)
            for name in names
        ]
        yield from zip(*parts, strict=True)
    else:
        yield from (
            tuple(row.get(name, DEFAULTS[name]) if name in DEFAULTS else row[name] for name in names) for row in rows
        )


def verdicts(
    rows: Rows,
    *,
    eps: Sequence[float] = (),
    attacks: Sequence[str] = (),
    goal: str | None = None,
    group: Callable[[str], str] = str,
    waiting: int = 0,
    awaited: Sequence[str] | None = None,
) -> Verdicts:
    """Return the worst case per image over all attacks, images in the order of `index`.

    `eps` and `attacks` are those of the run's config: they fix the order of the attacks, and an eps without any row
    is kept. Attacks that only the rows name (the parts of an ensemble) follow in order of appearance. Only the rows of
    `goal` count, where it is given. `group` returns what an image, by its id, is a copy of. For
    `waiting` and `awaited` see `Verdicts`; None: each of those that wait is its own.

    Example:
        >>> row = {"index": 0, "image_id": "a", "label": 1, "clean_prediction": 1, "attack": "pgd", "eps": 0.1}
        >>> v = verdicts([{**row, "outcome": "robust"}, {**row, "eps": 0.2, "outcome": "fooled"}])
        >>> [v.after(v.images[0], i) for i in range(2)]
        ['robust', 'fooled']
    """
    pairs = [(e, attack) for e, attack, of in columns(rows, "eps", "attack", "goal") if goal in (None, of)]
    all_eps = tuple(sorted({float(e) for e in eps} | {float(e) for e, _ in pairs}))
    seen = dict.fromkeys(attack for _, attack in pairs)
    order = tuple([a for a in dict.fromkeys(attacks) if a in seen] + [a for a in seen if a not in set(attacks)])
    stage = {(e, a): i * len(order) + j for i, e in enumerate(all_eps) for j, a in enumerate(order)}

    about: dict[str, tuple[int, int, int, bool]] = {}
    fell: dict[str, int] = {}
    held: dict[str, set[int]] = {}
    fields = columns(rows, "index", "image_id", "label", "clean_prediction", "attack", "eps", "outcome", "goal")
    for index, image_id, label, clean_prediction, attack, radius, outcome, of in fields:
        if goal not in (None, of):
            continue
        *_, before = about.get(image_id, (False,))
        # One row that was attacked says that the image is exposed, whatever a random model is found to say later.
        about[image_id] = (index, label, clean_prediction, before or outcome != "clean_wrong")
        here = stage[float(radius), attack]
        # "skipped" says that an earlier stage has already fooled the image.
        if outcome in ("fooled", "skipped"):
            fell[image_id] = min(here, fell.get(image_id, here))
        elif outcome == "robust":
            held.setdefault(image_id, set()).add(here)
    images = [
        ImageVerdict(
            index,
            image_id,
            label,
            clean,
            exposed,
            fell.get(image_id),
            frozenset(held.get(image_id, ())),
            group(image_id),
        )
        for image_id, (index, label, clean, exposed) in about.items()
    ]
    if awaited is None:
        awaited = [f"waiting {number}" for number in range(waiting)]
    if len(awaited) > waiting:
        raise ValueError(f"{len(awaited)} images are awaited and {waiting} wait")
    images.sort(key=lambda image: (image.index, image.image_id))
    return Verdicts(all_eps, order, tuple(images), waiting, tuple(awaited))


@dataclass(frozen=True)
class Point:
    """What the model said of one image unperturbed, and at the worst point that any attack found."""

    image_id: str
    clean_prediction: int
    clean_cosine: float
    prediction: int
    cosine: float
    margin: float


def worst_points(rows: Rows, goal: str, eps: float) -> list[Point]:
    """Return, per image, the point of lowest margin over all attacks in balls up to `eps`; the clean one without any.

    A point where the goal was reached comes before all others.
    """
    names = ("image_id", "eps", "goal", "outcome", "clean_prediction", "clean_margin", "clean_cosine", "margin")
    worst: dict[str, tuple[bool, Point]] = {}
    for image_id, radius, of, outcome, clean, clean_margin, clean_cosine, margin, cosine, said in columns(
        rows, *names, "cosine", "adversarial_prediction"
    ):
        if of != goal or radius > eps:
            continue
        start = Point(image_id, clean, clean_cosine, clean, clean_cosine, clean_margin)
        reached, best = worst.setdefault(image_id, (False, start))
        if outcome not in ("fooled", "robust"):
            continue
        fooled = outcome == "fooled"
        if (fooled and not reached) or (fooled == reached and margin < best.margin):
            worst[image_id] = (fooled, Point(image_id, clean, clean_cosine, said, cosine, margin))
    return [point for _, point in worst.values()]


class LevelSummary(Record):
    """Accuracy at one level of a class tree, unperturbed and at the points that the attacks recorded.

    An image counts when its predicted class lies in its label's superclass, unperturbed and at every recorded point.
    `robust_accuracy_at_most` also counts the images that are not done with, as long as nothing speaks against them.
    """

    name: str
    tree: str
    level: int
    superclasses: int
    clean_accuracy: Rate
    robust_accuracy: Rate
    robust_accuracy_at_most: Rate | None = None


class TransferRow(Record):
    """What is left at every level after attacks against one of them (or all at once)."""

    goal: str
    name: str
    robust_accuracy: list[Rate]
    robust_accuracy_at_most: list[Rate] | None = None


class LevelTransfer(Record):
    """Attacks against level i (rows) scored at level j (columns); both from the classes up."""

    levels: list[str]
    clean_accuracy: list[Rate]
    rows: list[TransferRow]


# Robust accuracy at every level of a class tree, and how attacks against one level do at the others

# Recorded points of an image: eps and predicted class.
Points = dict[str, list[tuple[float, int]]]


@dataclass(frozen=True)
class Level:
    """A level of a tree: `of[k]` is the superclass of class k, numbered from 0."""

    tree: str
    level: int
    of: Sequence[int]
    several: bool = False

    @property
    def superclasses(self) -> int:
        return len(set(self.of))

    @property
    def name(self) -> str:
        where = f"{self.tree}, " if self.several else ""
        what = "classes" if self.level == 0 else f"level {self.level}"
        return f"{where}{what} ({self.superclasses})"

    def same(self, label: int, prediction: int) -> bool:
        """Whether a prediction lies in the label's superclass; rejected and failed images lie in none."""
        return label >= 0 and prediction >= 0 and self.of[label] == self.of[prediction]


def tree_levels(data: Mapping[str, Any]) -> list[Level]:
    """Return the levels that a run's manifest holds, those of the classes included; none without a tree."""
    found = data.get("levels") or []
    several = len({item["tree"] for item in found}) > 1
    return [Level(item["tree"], item["level"], item["of"], several) for item in found]


def level_summaries(rows: Rows, table: Verdicts, eps_index: int, levels: Sequence[Level]) -> list[LevelSummary]:
    """Return accuracy at every level after all attacks up to an eps, from the predictions at recorded points.

    Images on which nothing is decided, and those that wait, count as wrong, as they do in robust accuracy.
    """
    points = _points(rows) if levels else {}
    unsettled = _unsettled(rows, table, eps_index) if levels else set()
    found = []
    for level in levels:
        least, most = _robust(table, eps_index, level, points, unsettled)
        found.append(
            LevelSummary(
                name=level.name,
                tree=level.tree,
                level=level.level,
                superclasses=level.superclasses,
                clean_accuracy=_clean(table, level),
                robust_accuracy=least,
                robust_accuracy_at_most=most,
            )
        )
    return found


def level_transfer(
    rows: Rows,
    goals: Sequence[str],
    eps_index: int,
    levels: Sequence[Level],
    of_goal: Callable[[str], Verdicts],
) -> LevelTransfer:
    """Return the transfer matrix at one eps; `goals` are those attacked, in order, `of_goal` returns a goal's table."""
    found, clean = [], []
    # A goal is `superclass:LEVEL`, or `superclass:ROOT/LEVEL` where it is about one tree of several.
    root = goals[0].partition(":")[2].rpartition("/")[0]
    levels = [level for level in levels if level.tree == (root or levels[0].tree)]
    names = {str(level.level): level.name for level in levels} | {"all": "all levels at once"}
    for goal in goals:
        name = names.get(goal.partition(":")[2].rpartition("/")[2], goal)
        table = of_goal(goal)
        points, unsettled = _points(rows, goal), _unsettled(rows, table, eps_index, goal, everyone=True)
        clean = [_clean(table, level) for level in levels]
        bounds = [_robust(table, eps_index, level, points, unsettled) for level in levels]
        least, most = ([pair[side] for pair in bounds] for side in (0, 1))
        found.append(TransferRow(goal=goal, name=name, robust_accuracy=least, robust_accuracy_at_most=most))
    return LevelTransfer(levels=[level.name for level in levels], clean_accuracy=clean, rows=found)


def _points(rows: Rows, goal: str | None = None) -> Points:
    points: Points = defaultdict(list)
    fields = columns(rows, "image_id", "eps", "goal", "outcome", "steps", "adversarial_prediction")
    for image_id, eps, of, outcome, steps, prediction in fields:
        measured = outcome in ("fooled", "robust", "failed") or (outcome == "clean_wrong" and steps)
        if measured and goal in (None, of):
            points[image_id].append((float(eps), prediction))
    return points


def _unsettled(
    rows: Rows, table: Verdicts, eps_index: int, goal: str | None = None, *, everyone: bool = False
) -> set[str]:
    """Return the images of which more could still become known at this eps: attacks broke, or did not come to them.

    Where no image leaves at its first success, attacks after one are owed as well; with `everyone`, also to images on
    which the goal is reached unperturbed.
    """
    eps = table.eps[eps_index]
    found = {image.image_id for image in table.images if table.after(image, eps_index) == "undecided"}
    fields = columns(rows, "image_id", "eps", "goal", "outcome", "passes", "clean_prediction")
    for image_id, radius, of, outcome, passes, clean in fields:
        if radius > eps or goal not in (None, of):
            continue
        stays = everyone or of.partition(":")[0] == "feature"
        owed = outcome == "skipped" or (everyone and outcome == "clean_wrong" and not passes and clean != NO_ANSWER)
        if outcome == "undecided" or (stays and owed):
            found.add(image_id)
    return found


def _clean(table: Verdicts, level: Level) -> Rate:
    right = sum(level.same(image.label, image.clean_prediction) for image in table.images)
    return table.share(right)


def _robust(
    table: Verdicts, eps_index: int, level: Level, points: Points, unsettled: Collection[str]
) -> tuple[Rate, Rate]:
    """Return accuracy at a level if no unsettled image counts, and if all count that nothing speaks against."""
    eps, least, most = table.eps[eps_index], 0, table.waiting
    for image in table.images:
        said = [said for radius, said in points.get(image.image_id, ()) if radius <= eps and said != NO_ANSWER]
        right = all(level.same(image.label, prediction) for prediction in [image.clean_prediction, *said])
        most += right
        least += right and image.image_id not in unsettled
    return table.share(least), table.share(most)

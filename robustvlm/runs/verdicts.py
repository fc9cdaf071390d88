"""From result rows to one verdict per image and eps: the worst case over every attack that was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa

Rows: TypeAlias = pa.Table | Sequence[Mapping[str, Any]]
# Predictions that are no class: the image was rejected; there is no answer (not finite, or not attacked).
REJECTED, NO_ANSWER = -1, -2

Outcome = Literal["clean_wrong", "fooled", "robust", "undecided"]


@dataclass(frozen=True)
class ImageVerdict:
    """One image: what the model said of it unperturbed, and the first stage of the attack that fooled it.

    A stage is one attack at one eps; stages are numbered by rising eps, then by the order of the attacks. `fell` is the
    stage that fooled the image (None: no stage did), `held` the stages that ran to their end without success. An image
    is not `exposed` when the goal was reached without any perturbation.
    """

    index: int
    image_id: str
    label: int
    clean_prediction: int
    exposed: bool
    fell: int | None
    held: frozenset[int]

    @property
    def clean_correct(self) -> bool:
        """Whether the unperturbed image was classified right; of an unknown class: whether it was rejected."""
        return self.clean_prediction == self.label


@dataclass(frozen=True)
class Verdicts:
    """All images of a run, with the eps (rising) and attacks (in order) that number the stages."""

    eps: tuple[float, ...]
    attacks: tuple[str, ...]
    images: tuple[ImageVerdict, ...]

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
    rows: Rows, *, eps: Sequence[float] = (), attacks: Sequence[str] = (), goal: str | None = None
) -> Verdicts:
    """Return the worst case per image over all attacks, images in the order of `index`.

    `eps` and `attacks` are those of the run's config: they fix the order of the attacks, and an eps without any row
    is kept. Attacks that only the rows name (the parts of an ensemble) follow in order of appearance. Only the rows of
    `goal` count, where it is given.

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
        about[image_id] = (index, label, clean_prediction, outcome != "clean_wrong")
        here = stage[float(radius), attack]
        # "skipped" says that an earlier stage has already fooled the image.
        if outcome in ("fooled", "skipped"):
            fell[image_id] = min(here, fell.get(image_id, here))
        elif outcome == "robust":
            held.setdefault(image_id, set()).add(here)
    images = [
        ImageVerdict(index, image_id, label, clean, exposed, fell.get(image_id), frozenset(held.get(image_id, ())))
        for image_id, (index, label, clean, exposed) in about.items()
    ]
    return Verdicts(all_eps, order, tuple(sorted(images, key=lambda image: (image.index, image.image_id))))


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

"""From result rows to one verdict per image and eps: the worst case over every attack that was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa

Rows: TypeAlias = pa.Table | Sequence[Mapping[str, Any]]
Outcome = Literal["clean_wrong", "fooled", "robust", "undecided"]


@dataclass(frozen=True)
class ImageVerdict:
    """One image: what the model said of it unperturbed, and the first stage of the attack that fooled it.

    A stage is one attack at one eps; stages are numbered by rising eps, then by the order of the attacks. `fell` is the
    stage that fooled the image (None: no stage did), `held` the stages that ran to their end without success.
    """

    index: int
    image_id: str
    label: int
    clean_prediction: int
    fell: int | None
    held: frozenset[int]

    @property
    def clean_correct(self) -> bool:
        """Whether the unperturbed image was classified right."""
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
        fallen here too. "undecided": right when clean, not fooled, and some attack broke or has no row, so that
        nothing is known.
        """
        if not image.clean_correct:
            return "clean_wrong"
        last = len(self.attacks) - 1 if attack_index is None else attack_index
        begin = eps_index * len(self.attacks)
        if image.fell is not None and image.fell <= begin + last:
            return "fooled"
        needed = range(begin, begin + last + 1)
        return "robust" if needed and all(stage in image.held for stage in needed) else "undecided"


def columns(rows: Rows, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the named values of each row, from an Arrow table or a list of dicts.

    Example:
        >>> list(columns([{"a": 1, "b": 2, "c": 3}], "a", "c"))
        [(1, 3)]
    """
    if isinstance(rows, pa.Table):
        yield from zip(*(rows.column(name).to_pylist() for name in names), strict=True)
    else:
        yield from (tuple(row[name] for name in names) for row in rows)


def verdicts(rows: Rows, *, eps: Sequence[float] = (), attacks: Sequence[str] = ()) -> Verdicts:
    """Return the worst case per image over all attacks, images in the order of `index`.

    `eps` and `attacks` are those of the run's config: they fix the order of the attacks, and an eps without any row
    is kept. Attacks that only the rows name (the parts of an ensemble) follow in order of appearance.

    Example:
        >>> row = {"index": 0, "image_id": "a", "label": 1, "clean_prediction": 1, "attack": "pgd", "eps": 0.1}
        >>> v = verdicts([{**row, "outcome": "robust"}, {**row, "eps": 0.2, "outcome": "fooled"}])
        >>> [v.after(v.images[0], i) for i in range(2)]
        ['robust', 'fooled']
    """
    pairs = list(columns(rows, "eps", "attack"))
    all_eps = tuple(sorted({float(e) for e in eps} | {float(e) for e, _ in pairs}))
    seen = dict.fromkeys(attack for _, attack in pairs)
    order = tuple([a for a in dict.fromkeys(attacks) if a in seen] + [a for a in seen if a not in set(attacks)])
    stage = {(e, a): i * len(order) + j for i, e in enumerate(all_eps) for j, a in enumerate(order)}

    about: dict[str, tuple[int, int, int]] = {}
    fell: dict[str, int] = {}
    held: dict[str, set[int]] = {}
    fields = columns(rows, "index", "image_id", "label", "clean_prediction", "attack", "eps", "outcome")
    for index, image_id, label, clean_prediction, attack, radius, outcome in fields:
        about[image_id] = (index, label, clean_prediction)
        here = stage[float(radius), attack]
        # "skipped" says that an earlier stage has already fooled the image.
        if outcome in ("fooled", "skipped"):
            fell[image_id] = min(here, fell.get(image_id, here))
        elif outcome == "robust":
            held.setdefault(image_id, set()).add(here)
    images = [
        ImageVerdict(index, image_id, label, clean, fell.get(image_id), frozenset(held.get(image_id, ())))
        for image_id, (index, label, clean) in about.items()
    ]
    return Verdicts(all_eps, order, tuple(sorted(images, key=lambda image: (image.index, image.image_id))))

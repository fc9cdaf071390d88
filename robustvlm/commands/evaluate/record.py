"""What an evaluation has found: a row for each image, kept as they come, and the numbers made of all rows."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from robustvlm.commands.common.store import JournalLedger, cost_of
from robustvlm.commands.evaluate import measures
from robustvlm.commands.evaluate.corrupted import Answers, Corruptions, as_fact, from_fact
from robustvlm.data.source import UNKNOWN
from robustvlm.data.trees import Forest, Tree
from robustvlm.runs.folder import RunFolder
from robustvlm.stats import Rate, rate, worth_of

# The summary

ENDS = (1, 5, 10)
"""The k of recall at k."""


class LevelAccuracy(BaseModel):
    """How often the prediction falls into the label's superclass, at one level of one class tree."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tree: str
    level: int
    superclasses: int
    accuracy: Rate


class Subgroup(BaseModel):
    """Accuracy on the images of one subgroup, of all classes together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    accuracy: Rate


class Unevenness(BaseModel):
    """MacroStd: how far accuracy differs between the parts of a class, as a mean over classes of two parts or more.

    Args:
        by: the parts, "subgroups" of a class or "classes" of a superclass; tree, level: of the superclasses.
        divided: how many of them have two parts or more. value: MacroStd, in [0, 0.5]; low, high: its 95% interval,
            from bootstrap draws over images, copies of one thing together.
        by_chance: what chance alone gives, where all parts of a class are alike: its mean over draws.
        p_value: of the hypothesis that they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["subgroups", "classes"]
    tree: str | None = None
    level: int | None = None
    divided: int
    value: float
    low: float
    high: float
    by_chance: float
    p_value: float
    parts: list[Subgroup] = []


class Retrieval(BaseModel):
    """Recall at k of image-text retrieval: `text` of the captions of an image, `image` of the image of a caption.

    `cut` captions are longer than what the text tower reads: they count by their beginning.

    Captions of one image are no independent evidence: intervals of `image` are those of so many images as the captions
    are worth (`stats.worth_of`), all images where each has equally many and fewer where some have most of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    captions: int
    without: int = 0
    cut: int = 0
    text: dict[int, Rate]
    image: dict[int, Rate]


class CleanResult(BaseModel):
    """What a clean evaluation found; images `unreadable` or of an `unknown` class are not among `images` and rates.

    Of a model that may refuse, a right answer is one that it accepts; `rejected` is the share of the known images that
    it rejects, `unknown_rejected` that of the unknown ones. Both are None for other models. A model that abstains gives
    no answer to a share `abstained` of the known and `unknown_abstained` of the unknown ones; one whose copies vote for
    a class or for none of them may do either, and has both. `top5` is None for fewer
    than 5 classes, and what needs classes, captions or subgroups is None without them. `worth` is how many independent
    images those of known classes are worth, where copies of one thing are among them; None in runs of before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    model_fingerprint: str
    data: str
    classes: int
    images: int
    unknown: int
    unreadable: int
    unreadable_reasons: list[tuple[str, str]]
    remarks: list[str] = []
    accuracy: Rate
    worth: float | None = None
    top5: Rate | None = None
    mean_per_class_recall: float | None = None
    calibration_error: float | None = None
    mean_confidence: float | None = None
    superclass_accuracy: list[LevelAccuracy]
    unevenness: list[Unevenness] = []
    retrieval: Retrieval | None = None
    corruptions: Corruptions | None = None
    rejected: Rate | None = None
    unknown_rejected: Rate | None = None
    abstained: Rate | None = None
    unknown_abstained: Rate | None = None
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Throughput, reading and decoding included."""
        return self.images / self.seconds if self.seconds > 0 else 0.0


# Rows

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("image_id", pa.string()),
        ("label", pa.int32()),
        ("subgroup", pa.string()),
        ("prediction", pa.int32()),
        ("correct", pa.bool_()),
        ("place", pa.int32()),
        ("confidence", pa.float64()),
        ("accepted", pa.bool_()),
        ("caption_place", pa.int64()),
        ("undecided", pa.bool_()),
    ]
)
CAPTIONS = pa.schema(
    [("index", pa.int64()), ("image_id", pa.string()), ("caption", pa.string()), ("image_place", pa.int64())]
)


@dataclass(frozen=True)
class ImageRow:
    """What was found for one image, in source order.

    Args:
        label: -1 for an unknown class; prediction: the class with the largest logit, -1 where the model was not asked.
        correct: right, and accepted; None for an unknown class. place: of the label among the logits, from 1.
        confidence: the largest softmax probability. accepted: of a model that may refuse or abstain.
        undecided: of one that may do both, whether it gave no answer, instead of refusing the image.
    """

    index: int
    image_id: str
    label: int
    subgroup: str = ""
    prediction: int = UNKNOWN
    correct: bool | None = None
    place: int | None = None
    confidence: float | None = None
    accepted: bool | None = None
    undecided: bool | None = None

    @property
    def known(self) -> bool:
        """Whether it counts for accuracy."""
        return self.correct is not None


def table_of(rows: Sequence[ImageRow], caption_places: dict[int, int] | None = None) -> pa.Table:
    """Return the rows as a table in source order.

    Example:
        >>> table_of([ImageRow(0, "a", 2, prediction=2, correct=True, place=1)]).column("correct").to_pylist()
        [True]
    """
    found = caption_places or {}
    names = [field.name for field in fields(ImageRow)]
    ordered = sorted(rows, key=lambda row: row.index)
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in ordered] for name in names}
    columns["caption_place"] = [found.get(row.index) for row in ordered]
    return pa.table(columns, schema=SCHEMA)


class EvaluateLedger(JournalLedger):
    """The rows of an evaluation, a batch a line: a session that was killed goes on behind the last whole batch."""

    def __init__(self, folder: RunFolder) -> None:
        self.rows: list[ImageRow] = []
        self.corrupted: Answers = {}
        self.batches = 0
        super().__init__(folder)

    @property
    def seen(self) -> set[str]:
        """Ids of the images that are done or cannot be read."""
        return {row.image_id for row in self.rows} | {image.id for image in self.unreadable}

    def add_batch(self, rows: Sequence[ImageRow]) -> None:
        """Record a batch."""
        self._add(
            {"kind": "batch"} | {field.name: [getattr(row, field.name) for row in rows] for field in fields(ImageRow)}
        )

    def add_corrupted(self, answers: Answers) -> None:
        """Record a batch's answers on corrupted images; before its rows, so that a batch with rows has them."""
        self._add(as_fact(answers))

    def add_cost(self, *, forward: int, seconds: float, model_seconds: float) -> None:
        """Record what this session has cost so far."""
        self._add_cost(cost_of(forward=forward, seconds=seconds, model_seconds=model_seconds))

    def _take_own(self, kind: str, fact: dict[str, Any]) -> None:
        if kind == "corrupted":
            for text, answers in from_fact(fact).items():
                self.corrupted.setdefault(text, {}).update(answers)
            return
        if kind != "batch":
            raise ValueError(f"unknown kind of fact '{kind}'")
        nothing = [None] * len(fact["index"])  # of a session before this was told
        columns = [fact.get("undecided", nothing) if field.name == "undecided" else fact[field.name]
                   for field in fields(ImageRow)]  # fmt: skip
        self.rows += [ImageRow(*values) for values in zip(*columns, strict=True)]
        self.batches += 1


# From rows to numbers


Group = Callable[[str], str]
"""What images that are no independent evidence have in common, by the id of one: they count once in intervals."""


def measured(
    rows: Iterable[ImageRow],
    forest: Forest | None,
    class_names: Sequence[str],
    *,
    abstains: bool = False,
    group: Group = str,
) -> dict[str, Any]:
    """Return the fields of a `CleanResult` that follow from the rows; what is not accepted of a model that `abstains`
    has no answer, instead of being rejected."""
    every = list(rows)
    known = [row for row in every if row.known]
    refusing = [row for row in every if row.accepted is not None]
    found: dict[str, Any] = {
        "images": len(known),
        "unknown": sum(row.label == UNKNOWN for row in every),
        "accuracy": rate_of(known, [bool(row.correct) for row in known], group),
        "worth": worth_of(group(row.image_id) for row in known),
        "superclass_accuracy": [],
    }
    if refusing:
        unknown = [row for row in refusing if not row.known]
        # Rows of a session before the two were told apart say neither.
        both = all(row.undecided is not None for row in refusing)
        for what in ("rejected", "abstained") if both else ("abstained",) if abstains else ("rejected",):
            withheld = (what == "abstained") if both else None
            found[what] = _rejected([row for row in refusing if row.known], withheld, group)
            found[f"unknown_{what}"] = _rejected(unknown, withheld, group) if unknown else None
    if not known:
        return found
    if len(class_names) >= measures.TOP:
        near = [(row.place or 0) <= measures.TOP and row.accepted is not False for row in known]
        found["top5"] = rate_of(known, near, group)
    labels = [row.label for row in known]
    # Summed once over all images: sums of batches would depend on the batch size in their last digits.
    confidences = [row.confidence or 0.0 for row in known]
    hits = torch.tensor([row.prediction == row.label for row in known])
    found["mean_per_class_recall"] = measures.mean_per_class_recall(labels, [bool(row.correct) for row in known])
    found["calibration_error"] = measures.calibration_error(
        measures.calibration_bins(torch.tensor(confidences).double(), hits)
    )
    found["mean_confidence"] = math.fsum(confidences) / len(known)
    levels = list(_levels(forest, class_names))
    found["superclass_accuracy"] = [_level(known, *level, group) for level in levels]
    by_class = (one for level in levels for one in _by_class(known, *level, group))
    found["unevenness"] = [*_by_subgroup(known, group), *by_class]
    return found


def rate_of(rows: Sequence[ImageRow], holds: Sequence[bool], group: Group) -> Rate:
    """Return the share of images for which something holds; copies of one thing count once in its interval."""
    return rate(sum(holds), len(holds), independent=worth_of(group(row.image_id) for row in rows))


def _rejected(rows: Sequence[ImageRow], withheld: bool | None, group: Group) -> Rate:
    """Return the share that is not accepted; with `withheld`, that whose answer is withheld, or that which is not."""
    return rate_of(rows, [not row.accepted and withheld in (None, bool(row.undecided)) for row in rows], group)


def _levels(forest: Forest | None, class_names: Sequence[str]) -> Iterable[tuple[str, int, torch.Tensor]]:
    for tree in forest or ():
        for level in range(1, tree.levels):
            # At the root every prediction is right, and where no classes are joined it is plain accuracy.
            if 1 < len(tree.level_names(level)) < len(class_names):
                yield tree.root, level, superclasses_of(tree, level, class_names)


def superclasses_of(tree: Tree, level: int, class_names: Sequence[str]) -> torch.Tensor:
    """Return the number of each class's superclass at a level: int64 [K]."""
    index = {name: i for i, name in enumerate(tree.level_names(level))}
    return torch.tensor([index[tree.ancestor(name, level)] for name in class_names])


def _level(
    known: Sequence[ImageRow], root: str, level: int, superclass_of: torch.Tensor, group: Group
) -> LevelAccuracy:
    labels, predictions = (torch.tensor([getattr(row, name) for row in known]) for name in ("label", "prediction"))
    accepted = torch.tensor([row.accepted is not False for row in known])
    right = measures.superclass_correct(predictions, labels, superclass_of) & accepted
    return LevelAccuracy(
        tree=root,
        level=level,
        superclasses=int(superclass_of.max()) + 1,
        accuracy=rate_of(known, right.tolist(), group),
    )


_PARTS = 100  # subgroups that are listed


def _by_subgroup(known: Sequence[ImageRow], group: Group) -> Iterable[Unevenness]:
    """Yield how unevenly classes are recognised over the subgroups of the data, where it tells any."""
    names = {row.subgroup for row in known} - {""}
    found = uneven([(row.label, row.subgroup, bool(row.correct), group(row.image_id)) for row in known if row.subgroup])
    if len(names) < 2 or found is None:
        return
    counted: dict[str, list[ImageRow]] = defaultdict(list)
    for row in known:
        if row.subgroup:
            counted[row.subgroup].append(row)
    parts = [
        Subgroup(name=name, accuracy=rate_of(part, [bool(row.correct) for row in part], group))
        for name, part in sorted(counted.items())
    ]
    parts.sort(key=lambda part: part.accuracy.value or 0.0)
    yield Unevenness(by="subgroups", parts=parts[:_PARTS], **found)


def _by_class(
    known: Sequence[ImageRow], root: str, level: int, superclass_of: torch.Tensor, group: Group
) -> Iterable[Unevenness]:
    """Yield how unevenly the classes of a superclass are recognised."""
    place = superclass_of.tolist()
    found = uneven([(place[row.label], row.label, bool(row.correct), group(row.image_id)) for row in known])
    if found is not None:
        yield Unevenness(by="classes", tree=root, level=level, **found)


def uneven(facts: Sequence[tuple[int, Any, bool, str]]) -> dict[str, Any] | None:
    """Return MacroStd with its interval, of (class, part, right, group); None where no class has two parts.

    Images of one group are no independent evidence: what chance gives, p and the interval take them as a whole.
    """
    cells: dict[int, dict[Any, dict[str, list[int]]]] = defaultdict(lambda: defaultdict(dict))
    for label, part, right, group in facts:
        cell = cells[label][part].setdefault(group, [0, 0])
        cell[0] += 1
        cell[1] += right
    groups: dict[int, NDArray[np.int64]] = {
        label: np.array([(place, *of) for place, name in enumerate(sorted(parts)) for of in parts[name].values()])
        for label, parts in sorted(cells.items())
        if len(parts) > 1
    }
    if not groups:
        return None
    counts = {label: _summed(table) for label, table in groups.items()}
    value = measures.macro_std(counts)
    again, chance = measures.macro_std_draws(groups)
    least, most = np.quantile(again, [0.025, 0.975])
    return {
        "divided": len(counts),
        "value": value,
        # Few images a part make spread out of nothing, in the draws once more than in the data: what the draws lie
        # above the value is taken off below it (the basic bootstrap), and the value itself stays inside.
        "low": float(max(0.0, min(value, 2 * value - most))),
        "high": float(min(0.5, max(value, 2 * value - least))),
        "by_chance": float(chance.mean()),
        "p_value": float((1 + (chance >= value - 1e-12).sum()) / (1 + len(chance))),
    }


def _summed(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the images and the right ones of each part: [G, 2], of a row (part, images, right) for each group."""
    return np.stack([np.bincount(groups[:, 0], weights=groups[:, side]) for side in (1, 2)], axis=1).astype(np.int64)


def recalls(
    of_images: torch.Tensor,
    of_texts: torch.Tensor,
    owner: torch.Tensor,
    *,
    groups: Sequence[str] | None = None,
    without: int = 0,
) -> Retrieval:
    """Return recall at 1, 5 and 10 of places as `retrieval_places` gives them; a k above the number there is left out.

    Args:
        owner: the image that each text is about. groups: what an image has in common with those that are no
            independent evidence beside it. without: images that have no caption.

    Example:
        >>> found = recalls(torch.tensor([1, 2, 4]), torch.tensor([1, 1, 1, 3]), torch.tensor([0, 0, 1, 2]))
        >>> found.text[1].successes, found.image[1].successes, list(found.text)
        (1, 3, [1])
    """
    images, texts = len(of_images), len(of_texts)
    same = list(groups or map(str, range(images)))
    worth, worth_of_texts = worth_of(same), worth_of(same[image] for image in owner.tolist())
    return Retrieval(
        images=images,
        captions=texts,
        without=without,
        text={k: rate(int((of_images <= k).sum()), images, independent=worth) for k in ENDS if k <= texts},
        image={
            k: rate(int((of_texts <= k).sum()), texts, independent=worth_of_texts, each="image")
            for k in ENDS
            if k <= images
        },
    )

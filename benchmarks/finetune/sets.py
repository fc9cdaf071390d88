"""The two sets: which model is tuned on which images and classes, and on what it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustvlm.core.framing import to_pixels
from robustvlm.data import open_data
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.data.trees import Forest, Tree

from .measure import Images
from .trees import by_place

CIFAR_LEFT_OUT = ("deer", "truck")


@dataclass(frozen=True)
class Condition:
    """Images of some classes, to be told apart from `class_names`; `left_out`: none is tuned on."""

    name: str
    class_names: tuple[str, ...]
    images: Images
    left_out: bool = False


@dataclass(frozen=True)
class BenchmarkSet:
    """One part of the benchmark.

    Attributes:
        model: spec of the model that is tuned.
        train: images of the classes that it is tuned on.
        forest: trees over those classes, the bundled one first.
        lr, batch: of the training.
        seen: test images of those classes; `transfer`: of classes or styles that it is not tuned on.
        together: test images of both kinds of classes, among all of them: to lean towards one kind does not pay here.
        levels: whether superclasses are also asked for as those of the predicted class.
    """

    name: str
    model: str
    train: DataSource
    forest: Forest
    lr: float
    batch: int
    seen: Condition
    transfer: tuple[Condition, ...]
    together: Condition
    levels: bool = True


def cifar10(train: Path, test: Path, limit: int) -> BenchmarkSet:
    """Eight classes of CIFAR-10 to tune on; the other two, among all ten, as transfer."""
    source, held = open_data(f"parquet:{train}"), open_data(f"parquet:{test}")
    names = tuple(name for name in source.class_names if name not in CIFAR_LEFT_OUT)
    assert source.tree is not None
    everything = read_images(held, 32)
    others = [held.class_names.index(name) for name in CIFAR_LEFT_OUT]
    unseen = _some(everything, torch.isin(everything.labels, torch.tensor(others)), limit)
    return BenchmarkSet(
        "cifar10",
        "benchmarks.cifar10.model:load",
        Restricted(source, names),
        _forest(source.tree, by_place("cifar10", names), names),
        lr=5e-4,
        batch=128,
        seen=Condition("8 classes tuned on", names, _of_classes(everything, held.class_names, names, limit)),
        transfer=(Condition("2 classes left out, among all 10", held.class_names, unseen),),
        together=Condition("all 10 classes", held.class_names, _some(everything, everything.labels >= 0, limit)),
    )


def emoji(limit: int) -> BenchmarkSet:
    """The bundled set: 101 classes in six styles to tune on; another style, and the other 72 classes, as transfer."""
    source, everything = open_data("emoji?split=train&copies=2"), open_data("emoji?split=test&labels=all&copies=2")
    assert source.tree is not None
    others = tuple(name for name in everything.class_names if name not in set(source.class_names))
    # The first two copies are what is trained on; later ones show the same sprites on other backgrounds.
    fresh, styled = open_data("emoji?split=train&copies=4"), open_data("emoji?split=test&copies=8")
    later = [name for name in fresh.ids() or [] if int(name.rsplit("/", 1)[1]) >= 2]
    drawn = read_images(everything, 64)
    return BenchmarkSet(
        "emoji",
        "tiny",
        source,
        _forest(source.tree, by_place("emoji", source.class_names), source.class_names),
        lr=5e-4,
        batch=64,
        seen=Condition("styles tuned on", source.class_names, read_images(fresh, 64, select(later, limit))),
        transfer=(
            Condition("another style", source.class_names, read_images(styled, 64, select(styled.ids() or [], limit))),
            Condition(
                "72 other classes, another style",
                others,
                _of_classes(drawn, everything.class_names, others, limit),
            ),
        ),
        together=Condition(
            "all 173 classes, another style", everything.class_names, _some(drawn, drawn.labels >= 0, limit)
        ),
    )


class Restricted(DataSource):
    """The images of some classes of a source, labelled by these classes alone; the others have no known class."""

    def __init__(self, source: DataSource, class_names: Sequence[str]) -> None:
        super().__init__(f"{source.spec} of {len(class_names)} classes", class_names, templates=source.templates)
        self.source = source
        self._label = _new_labels(source.class_names, class_names)

    def ids(self) -> list[str] | None:
        return self.source.ids()

    def _identity(self) -> tuple[str, ...]:
        return (self.source.fingerprint(),)

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for item in self.source.samples(keep=keep):
            yield replace(item, label=int(self._label[item.label])) if isinstance(item, Sample) else item


def _forest(bundled: Forest, second: Tree, names: Sequence[str]) -> Forest:
    return Forest((bundled[0].restrict(names), second))


def _new_labels(old: Sequence[str], new: Sequence[str]) -> Tensor:
    place = {name: i for i, name in enumerate(new)}
    return torch.tensor([place.get(name, UNKNOWN) for name in old])


def read_images(source: DataSource, size: int, ids: Sequence[str] | None = None) -> Images:
    """Return the images of known classes: all of them, or those of some ids in the order of these.

    The first few of chosen ids are what is attacked; in a source's own order they would be of its first classes.
    """
    keep = None if ids is None else set(ids).__contains__
    found = [item for item in source.samples(keep=keep) if isinstance(item, Sample) and item.label != UNKNOWN]
    if ids is not None:
        place = {name: i for i, name in enumerate(ids)}
        found.sort(key=lambda item: place[item.id])
    pixels = torch.stack([to_pixels(item.image, size) for item in found])
    return Images(pixels, torch.tensor([item.label for item in found]), tuple(item.id for item in found))


def _some(images: Images, wanted: Tensor, limit: int) -> Images:
    """Return `limit` of the wanted images, chosen by their ids and in the order drawn by these."""
    row = {name: i for i, (name, take) in enumerate(zip(images.ids, wanted.tolist(), strict=True)) if take}
    chosen = select(list(row), limit)
    rows = [row[name] for name in chosen]
    return Images(images.pixels[rows], images.labels[rows], tuple(chosen))


def _of_classes(images: Images, old: Sequence[str], new: Sequence[str], limit: int) -> Images:
    """Return `limit` of the images of some classes, labelled by these."""
    labels = _new_labels(old, new)[images.labels]
    return _some(Images(images.pixels, labels, images.ids), labels != UNKNOWN, limit)

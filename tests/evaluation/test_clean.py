"""Clean evaluation: the same answer as one big batch, whatever the batch size; faults counted; memory flat."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from robustvlm.commands.evaluate.measures import expected_calibration_error
from robustvlm.commands.evaluate.work import evaluate_clean
from robustvlm.core.framing import to_pixels
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.data.trees import Forest, Tree
from robustvlm.defenses.classifier import Refusing, ZeroShot
from robustvlm.errors import UserError
from robustvlm.models import VLM, ZeroShotClassifier

NAMES = ("red", "green", "blue", "cyan")
FOREST = Forest(
    (
        Tree(
            (
                ("red", "warm", "colour"),
                ("green", "cold", "colour"),
                ("blue", "cold", "colour"),
                ("cyan", "cold", "colour"),
            )
        ),
    )
)


class Colours(VLM):
    """Features are the mean colour; runs out of memory above `most` images, gives NaN for black ones."""

    def __init__(self, most: int = 10_000) -> None:
        super().__init__(spec="colours", image_size=8, logit_scale=6.0)
        self.most = most
        self.batches: list[int] = []

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        self.batches.append(len(pixels))
        mean = pixels.mean(dim=(2, 3))
        return torch.where(mean.sum(dim=1, keepdim=True) == 0, torch.nan, mean)

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor(
            [{"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1]}.get(t, [0, 1, 1]) for t in texts]
        )


class Noise(DataSource):
    """Random pictures with random labels; every 7th is unreadable, every 11th of an unknown class."""

    def __init__(self, count: int = 60, *, tree: Forest | None = FOREST, colour: int | None = None) -> None:
        super().__init__("noise", NAMES, tree=tree)
        self.count, self.colour = count, colour
        self.alive: list[weakref.ref[Image.Image]] = []
        self.most_alive = 0

    def ids(self) -> list[str]:
        return [f"image-{i}" for i in range(self.count)]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for i, name in enumerate(self.ids()):
            if not keep(name):
                continue
            if i % 7 == 3:
                yield Unreadable(name, "cut short")
                continue
            rng = np.random.default_rng(i)
            tint = rng.integers(0, 256, 3) if self.colour is None else self.colour
            picture = Image.fromarray(np.broadcast_to(tint, (9, 8, 3)).astype(np.uint8))
            self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(picture)]
            self.most_alive = max(self.most_alive, len(self.alive))
            yield Sample(name, picture, -1 if i % 11 == 5 else int(rng.integers(0, 4)))


def classifier(most: int = 10_000) -> ZeroShotClassifier:
    vlm = Colours(most)
    return ZeroShotClassifier(vlm, NAMES, vlm.encode_text(NAMES))


def test_equals_one_big_batch_by_hand() -> None:
    source, model = Noise(), classifier()
    items = list(source.samples())
    known = [item for item in items if isinstance(item, Sample) and item.label >= 0]
    logits = model(torch.stack([to_pixels(sample.image, 8) for sample in known]))
    labels = torch.tensor([sample.label for sample in known])
    right = logits.argmax(1) == labels
    result = evaluate_clean(model, source)
    assert (result.images, result.accuracy.successes, result.accuracy.total) == (
        len(known),
        int(right.sum()),
        len(known),
    )
    assert result.unreadable == sum(isinstance(item, Unreadable) for item in items) > 0
    assert result.unknown == sum(isinstance(item, Sample) and item.label < 0 for item in items) > 0
    assert result.unreadable_reasons[0] == ("image-3", "cut short")
    expected = expected_calibration_error(logits.softmax(1).amax(1), right)
    assert result.calibration_error == pytest.approx(expected, abs=1e-6)
    assert result.mean_confidence == pytest.approx(float(logits.softmax(1).amax(1).mean()), abs=1e-6)
    (level,) = result.superclass_accuracy
    assert (level.tree, level.level, level.superclasses) == ("colour", 1, 2)
    assert level.accuracy.successes == int(((logits.argmax(1) == 0) == (labels == 0)).sum()) > result.accuracy.successes


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    model = classifier()
    expected = evaluate_clean(model, Noise(), batch_size=1000)
    model.vlm.batches.clear()  # type: ignore[operator, union-attr]
    found = evaluate_clean(model, Noise(), batch_size=batch_size)
    assert found.accuracy == expected.accuracy
    assert found.calibration_error == pytest.approx(expected.calibration_error, abs=1e-6)
    assert set(model.vlm.batches[:-1]) <= {batch_size}  # type: ignore[index, arg-type]


def test_running_out_of_memory_halves_the_batch() -> None:
    small = classifier(most=5)
    assert evaluate_clean(small, Noise()).accuracy == evaluate_clean(classifier(), Noise()).accuracy
    assert max(small.vlm.batches) <= 5  # type: ignore[type-var, arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_clean(classifier(most=0), Noise())


def test_memory_is_flat() -> None:
    source = Noise(2000)
    gc.disable()
    try:
        evaluate_clean(classifier(), source, batch_size=10)
    finally:
        gc.enable()
    assert source.most_alive <= 25, "pictures of at most two batches are held"


def test_limit_and_progress() -> None:
    told: list[int] = []
    result = evaluate_clean(classifier(), Noise(), limit=20, batch_size=4, on_images=told.append)
    assert result.images + result.unknown + result.unreadable == 20
    assert min(told) > 0
    assert 16 < sum(told) <= 20  # those that cannot be read behind the last batch are not told


def test_classes_without_an_image_are_named_and_so_is_what_was_left_aside() -> None:
    class Three(Noise):
        def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
            return (item for item in super()._stream(keep) if isinstance(item, Unreadable) or item.label < 2)

    source = Three()
    source.remarks.append("left aside: '.txt'")
    whole = evaluate_clean(classifier(), source)
    assert whole.remarks == ["left aside: '.txt'", "no image that can be read is of 2 of the 4 classes: 'blue', 'cyan'"]
    assert evaluate_clean(classifier(), source, limit=20).remarks == ["left aside: '.txt'"]


def test_without_a_tree_there_are_no_levels() -> None:
    assert evaluate_clean(classifier(), Noise(tree=None)).superclass_accuracy == []


def test_class_trees_in_another_order_are_matched_by_name() -> None:
    turned = Forest((Tree(FOREST.trees[0].paths[::-1]),))
    expected = evaluate_clean(classifier(), Noise()).superclass_accuracy[0].accuracy
    assert evaluate_clean(classifier(), Noise(tree=turned)).superclass_accuracy[0].accuracy == expected


class Broken(Noise):
    def __init__(self, kind: str) -> None:
        super().__init__(4)
        self.kind = kind

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for name in self.ids():
            if keep(name) and self.kind == "unreadable":
                yield Unreadable(name, "cut short")
            elif keep(name) and self.kind == "unknown":
                yield Sample(name, Image.new("RGB", (4, 4)), -1)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (Noise(colour=0), "NaN or infinite logits, first for the image 'image-0'"),
        (Broken("unreadable"), "none of the 4 images of 'noise' could be read; the first, 'image-0': cut short"),
        (Broken("unknown"), "all 4 images of 'noise' are of unknown classes"),
        (Broken("empty"), "'noise' holds no images"),
    ],
)
def test_nothing_to_measure_is_named(source: DataSource, says: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate_clean(classifier(), source)
    assert says in str(caught.value)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(UserError, match="batch size must be at least 1 image, got 0"):
        evaluate_clean(classifier(), Noise(), batch_size=0)
    vlm = Colours()
    with pytest.raises(UserError, match="different classes"):
        evaluate_clean(ZeroShotClassifier(vlm, NAMES[:2], vlm.encode_text(NAMES[:2])), Noise())


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_model_that_refuses_is_right_only_where_it_accepts(batch_size: int) -> None:
    plain, source = classifier(), Noise()
    pictures = [item.image for item in source.samples() if isinstance(item, Sample)]
    sure = plain(torch.stack([to_pixels(image, 8) for image in pictures])).softmax(1).amax(1).sort().values
    # Between two neighbours, so that rounding decides nothing.
    threshold = float(sure[len(sure) // 2] + sure[len(sure) // 2 + 1]) / 2
    model = Refusing(ZeroShot(plain), threshold)
    found = evaluate_clean(model, source, batch_size=batch_size)
    known, unknown, right, rejected, intruded = 0, 0, 0, 0, 0
    for item in source.samples():
        if isinstance(item, Unreadable):
            continue
        logits = plain(to_pixels(item.image, 8)[None])[0]
        accepted = bool(logits.softmax(0).max() > threshold)
        known, unknown = known + (item.label >= 0), unknown + (item.label < 0)
        rejected += item.label >= 0 and not accepted
        intruded += item.label < 0 and accepted
        right += accepted and int(logits.argmax()) == item.label
    assert 0 < rejected < known
    assert (found.images, found.unknown, found.accuracy.successes) == (known, unknown, right)
    assert found.rejected is not None
    assert found.unknown_rejected is not None
    assert (found.rejected.successes, found.unknown_rejected.successes) == (rejected, unknown - intruded)
    assert evaluate_clean(plain, source).rejected is None

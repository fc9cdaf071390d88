"""Images for training: order, cutting, memory, augmentation, and images that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.core.framing import to_pixels
from robustvlm.data.source import Sample, Unreadable
from robustvlm.errors import UserError
from robustvlm.training import parse_augmentation
from robustvlm.training.images import AUGMENTATIONS, Augmentation, augment, spans

from .toy import SIDE, Squares, images

PLAIN = AUGMENTATIONS["none"]
ONE = 3 * SIDE * SIDE


def read(spans_: list[range], **options: object) -> list[tuple[str, torch.Tensor, int]]:
    batches = images(**options).batches(iter(spans_))
    return [
        (name, pixels, int(label))
        for batch in batches
        for name, pixels, label in zip(batch.ids, batch.pixels, batch.labels, strict=True)
    ]


def same(a: list[tuple[str, torch.Tensor, int]], b: list[tuple[str, torch.Tensor, int]]) -> bool:
    alike = (x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(alike)


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    first, second = ([item[0] for item in read([range(50 * e, 50 * e + 50)])] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(Squares(50).ids())
    assert first != second


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_ranks_and_parts_read_together_what_one_would_read(ranks: int, parts: int, step: int, steps: int) -> None:
    size = ranks * parts * 2
    shares = [
        [p for span in spans(step=step, last=step + steps, batch_size=size, part=2, rank=r, ranks=ranks) for p in span]
        for r in range(ranks)
    ]
    assert sorted(p for share in shares for p in share) == list(range(step * size, (step + steps) * size))


def test_pictures_do_not_depend_on_how_batches_are_cut() -> None:
    whole = read([range(30, 70)])
    assert same(whole, read([range(start, start + 4) for start in range(30, 70, 4)]))


@pytest.mark.parametrize("room", [1, 7, 23])
def test_a_bound_on_memory_changes_nothing(room: int) -> None:
    cut = [range(start, start + 5) for start in range(20, 120, 5)]
    source = Squares(50, broken={3, 8, 9}, unknown={21})
    bounded = images(source=source, cache_bytes=room * ONE)
    found = [
        item
        for batch in bounded.batches(iter(cut))
        for item in zip(batch.ids, batch.pixels, batch.labels.tolist(), strict=True)
    ]
    assert same(found, read(cut, source=source))
    assert len(bounded._pictures) <= max(room, 5)


def test_unusable_images_are_replaced_and_named() -> None:
    source = Squares(50, broken={3, 8}, unknown={21})
    data = images(source=source)
    shown = [name for batch in data.batches([range(100)]) for name in batch.ids]
    assert not {"square-3", "square-8", "square-21"} & set(shown)
    assert len(shown) == 100
    assert dict(data.skipped) == {"square-3": "damaged", "square-8": "damaged", "square-21": "of an unknown class"}
    # The others stand where they would have stood.
    whole = [name for batch in images().batches([range(100)]) for name in batch.ids]
    assert all(a == b for a, b in zip(shown, whole, strict=True) if b not in data.skipped)


def test_unlabelled_training_keeps_images_of_unknown_classes() -> None:
    labels = {item[0]: item[2] for item in read([range(50)], source=Squares(50, unknown={21}), labelled=False)}
    assert labels["square-21"] == -1


@pytest.mark.parametrize("room", [10, 1000])
def test_no_usable_image_is_one_line(room: int) -> None:
    data = images(source=Squares(5, broken=range(5)), cache_bytes=room * ONE)
    with pytest.raises(UserError, match=r"none of the images of 'squares' can be used; the first, 'square-.': damaged"):
        list(data.batches([range(4)]))


def test_a_source_that_cannot_name_its_images_is_read_through_once() -> None:
    class Stream(Squares):
        def ids(self) -> None:  # type: ignore[override]
            return None

        def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
            for i in range(self.count):
                if keep(f"square-{i}"):
                    yield self._sample(i, f"square-{i}")

    assert same(read([range(60)], source=Stream(50)), read([range(60)]))


def test_without_augmentation_pixels_are_those_of_evaluation() -> None:
    found = {name: pixels for name, pixels, _ in read([range(50)], how=PLAIN)}
    for sample in Squares(50).samples():
        assert isinstance(sample, Sample)
        assert torch.equal(found[sample.id], to_pixels(sample.image, SIDE))


def test_the_same_image_is_changed_otherwise_in_another_epoch() -> None:
    by_epoch = [{name: pixels for name, pixels, _ in read([range(50 * e, 50 * e + 50)])} for e in (0, 1)]
    assert sum(torch.equal(by_epoch[0][name], by_epoch[1][name]) for name in by_epoch[0]) < 5


@given(st.sampled_from(sorted(AUGMENTATIONS)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_augmented_images_stay_in_range_and_do_not_know_of_each_other(name: str, seed: int) -> None:
    pixels = torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    keys = [(seed, i) for i in range(5)]
    changed = augment(pixels, keys, AUGMENTATIONS[name])
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 1
    alone = torch.cat([augment(pixels[i : i + 1], keys[i : i + 1], AUGMENTATIONS[name]) for i in range(5)])
    assert torch.equal(changed, alone)


def test_a_flip_mirrors_about_half_of_the_images() -> None:
    pixels = torch.rand(400, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    changed = augment(pixels, [(i,) for i in range(400)], Augmentation(flip=True))
    mirrored = (changed == pixels.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (changed == pixels).flatten(1).all(1)).all())
    assert 160 < int(mirrored.sum()) < 240


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(UserError, match="unknown augmentation 'crops': did you mean 'crop'"):
        parse_augmentation("crops")

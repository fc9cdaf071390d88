"""Images of a run: numbered alike in every pass over them, whoever is skipped and whether a thread reads ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.data import open_data
from robustvlm.data.source import Unreadable

Photos = Callable[..., Path]


def images(photos: Path, ahead: int, limit: int | None = None) -> Images:
    return Images(open_data(f"imagefolder:{photos}"), limit=limit, resolution=16, ahead=ahead)


@pytest.mark.parametrize("limit", [None, 9])
def test_reading_ahead_changes_nothing(make_folder: Photos, limit: int | None) -> None:
    photos = make_folder(20)
    next(photos.rglob("*.png")).write_bytes(b"")
    plain, ahead = (list(images(photos, depth, limit).stream()) for depth in (0, 4))
    assert len(plain) == len(ahead) == (limit or 20)
    for a, b in zip(plain, ahead, strict=True):
        assert type(a) is type(b)
        assert a.id == b.id
        if isinstance(a, Picture) and isinstance(b, Picture):
            assert a.label == b.label
            assert torch.equal(a.pixels, b.pixels)
    assert sum(isinstance(item, Unreadable) for item in plain) <= 1


@pytest.mark.parametrize("ahead", [0, 3])
def test_numbers_do_not_depend_on_what_is_skipped(make_folder: Photos, ahead: int) -> None:
    photos = make_folder(20)
    whole = images(photos, ahead)
    numbers = {item.id: whole.index(item.id) for item in whole.stream()}
    assert list(numbers.values()) == list(range(20))
    part = images(photos, ahead)
    third = [item.id for item in part.stream(lambda name: part.index(name) % 3 == 1)]
    assert third == [name for name, number in numbers.items() if number % 3 == 1]
    assert [part.index(name) for name in third] == list(range(1, 20, 3))
    again = [item.id for item in part.stream(lambda name: name in third[:2])]
    assert again == third[:2]


def test_a_model_on_the_cpu_gets_no_thread(make_folder: Photos) -> None:
    stream = images(make_folder(6), ahead=0).stream()
    next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name == "robustvlm-prefetch"]

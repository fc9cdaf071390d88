"""Sizes on which rows get the same bits: every planted dependence on place or size is seen, and nothing else is."""

from __future__ import annotations

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustvlm.core.batches import _shift, narrower, steady_sizes

IMAGES = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))


@given(data=st.data(), count=st.integers(1, 40))
def test_what_is_returned_gives_every_image_the_same_bits_at_every_place(data: st.DataObject, count: int) -> None:
    kinds = {
        n: torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))) for n in range(1, count + 1)
    }

    def ask(rows: Tensor) -> list[Tensor]:
        return [IMAGES[rows] * (1 + kinds[len(rows)][:, None] * 2**-20)]

    sizes = steady_sizes(ask, count)
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert max(sizes) <= count
    assert len({int(kind) for size in sizes for kind in kinds[size]}) == 1, "one way of rounding in all of them"


@given(count=st.integers(1, 300), block=st.sampled_from([1, 2, 3, 4, 5, 6]))
def test_a_kernel_with_blocks_of_up_to_six_rows_costs_at_most_five(count: int, block: int) -> None:
    def ask(rows: Tensor) -> list[Tensor]:
        place = torch.arange(len(rows))
        return [(rows % 7 + 1.0) * torch.where(place < len(rows) // block * block, 1.0, 1.5)]

    first, *rest = steady_sizes(ask, count)
    assert first == count or first % block == 0
    assert first > count - 6 or first == 1 or count < 2 * block
    assert all(first < block or size % block == 0 for size in rest)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 64])
def test_a_kernel_that_treats_all_rows_alike_keeps_the_full_batch_and_asks_for_it_once_more(count: int) -> None:
    asked = []

    def ask(rows: Tensor) -> list[Tensor]:
        asked.append(len(rows))
        return [IMAGES[rows % 40], IMAGES[rows % 40, 0]]

    sizes = steady_sizes(ask, count, ask(torch.arange(count)))
    assert sizes == tuple(count >> i for i in range(count.bit_length()))
    assert asked.count(count) == (2 if count > 1 else 1)


def test_an_answer_that_is_not_finite_is_the_same_as_itself() -> None:
    assert steady_sizes(lambda rows: [IMAGES[rows].log() / 0], 4) == (4, 2, 1)


@given(size=st.integers(2, 5000))
def test_the_shift_maps_no_set_of_places_onto_itself(size: int) -> None:
    assert 0 < _shift(size) < size
    assert gcd(_shift(size), size) == 1


def test_less_memory_leaves_sizes_that_are_known_before_others() -> None:
    assert narrower((60, 15, 7)) == (15, 7)
    assert narrower((60,)) == (30,)

"""Batch sizes: enough room, allowed sizes only, never more rows than one batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from robustvlm.core.batches import batch_sizes, smallest


@given(st.lists(st.integers(1, 100), min_size=1, unique=True), st.data())
def test_sizes_are_allowed_and_suffice(rungs: list[int], data: st.DataObject) -> None:
    rungs.sort(reverse=True)
    rows = data.draw(st.integers(1, rungs[0]))
    sizes = batch_sizes(rungs, rows)
    assert set(sizes) <= set(rungs)
    assert len(sizes) <= 2
    assert rows <= sum(sizes) <= smallest(rungs, rows)
    # The last batch alone has spare rows, so that the first rows of all batches are those that were asked for.
    assert sum(sizes[:-1]) < rows


def test_one_batch_unless_a_second_saves_a_fifth() -> None:
    rungs = (64, 32, 16, 8, 4, 2, 1)
    assert [sum(batch_sizes(rungs, rows)) for rows in (33, 40, 48, 51, 52, 64)] == [33, 40, 48, 64, 64, 64]

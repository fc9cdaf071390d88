"""Batch sizes: enough room, allowed sizes only, never more rows than one batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from robustvlm.core.batches import SteadySizes, batch_sizes, smallest


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


def test_a_smaller_size_is_asked_about_only_when_it_has_been_paid_for() -> None:
    sizes = SteadySizes((16,))
    asked = [sizes.worth_trying(rows, paid=16) for rows in (15, 15, 9, 9, 9)]
    # Of 15 rows no step below 16 is left; of 9 rows it is 12, once 1 + 1 + 7 + 7 spare rows are paid.
    assert asked == [None, None, None, 12, None]
    sizes.note(12, agree=True, numbers=1000)
    assert sizes.worth_trying(1, paid=12) == 1
    assert sizes.steady == (16, 12)


def test_a_few_numbers_that_agree_are_no_evidence_and_one_that_does_not_is() -> None:
    sizes = SteadySizes((16,))
    for _ in range(63):
        sizes.note(1, agree=True, numbers=1)
    assert sizes.steady == (16,)
    sizes.note(1, agree=True, numbers=1)
    sizes.note(2, agree=True, numbers=63)
    sizes.note(2, agree=False, numbers=1)
    assert sizes.steady == (16, 1)
    assert sizes.worth_trying(2, paid=16) == 3, "what was seen to differ is never asked about again"


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.booleans())
def test_questions_never_cost_more_than_the_rows_that_were_wasted(rows: list[int], agree: bool) -> None:
    sizes = SteadySizes((64,))
    asked = []
    for count in rows:
        size = sizes.worth_trying(count, paid=64)
        if size is not None:
            asked.append(size)
            sizes.note(size, agree=agree, numbers=1)
    assert sum(asked) <= sum(64 - count for count in rows)

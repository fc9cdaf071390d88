"""Decoding ahead: the same items in the same order, never too many, errors where they belong, no thread left over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustvlm.data.decode import prefetch
from robustvlm.errors import UserError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "robustvlm-prefetch"]


@settings(max_examples=30, deadline=None)
@given(items=st.lists(st.integers()), depth=st.integers(0, 5))
def test_all_items_in_order_and_no_thread_stays(items: list[int], depth: int) -> None:
    assert list(prefetch(items, depth)) == items
    assert not threads()


def test_the_thread_runs_ahead_but_not_by_more_than_the_depth() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(numbers(), depth=3)
    assert made == []
    assert next(ahead) == 0
    time.sleep(0.1)
    # Three on the shelf, one in the hand of the thread that waits for room.
    assert made == [0, 1, 2, 3, 4]
    ahead.close()  # type: ignore[attr-defined]
    assert not threads()


def test_an_error_comes_after_the_items_before_it() -> None:
    def faulty() -> Iterator[int]:
        yield 1
        yield 2
        raise UserError("the disk is gone")

    items = prefetch(faulty(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(UserError, match="the disk is gone"):
        next(items)


def test_leaving_early_closes_the_source() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    for _ in prefetch(endless(), depth=2):
        break
    assert closed.wait(2)
    assert not threads()


def test_reading_and_working_go_on_side_by_side() -> None:
    def slow() -> Iterator[int]:
        for number in range(10):
            time.sleep(0.02)
            yield number

    began = time.monotonic()
    for _ in prefetch(slow(), depth=4):
        time.sleep(0.02)
    assert time.monotonic() - began < 0.36, "20 ms each after the other would be 0.4 s"

"""Reading and decoding ahead in a background thread, so that the model does not wait for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_FAREWELL_SECONDS = 1.0


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield `items` in their order, made by a background thread that runs at most `depth` of them ahead.

    An exception of the thread is raised here, after the items that came before it. The thread ends, and closes
    `items`, when this iterator is used up or closed.

    Example:
        >>> list(prefetch((n * n for n in range(4)), depth=2))
        [0, 1, 4, 9]
    """
    shelf = _Shelf[T](max(1, depth))
    thread = threading.Thread(target=_fill, args=(items, shelf), name="robustvlm-prefetch", daemon=True)
    thread.start()
    try:
        yield from shelf.taken()
    finally:
        shelf.close()
        # One that hangs in a network read is left behind: it finds the shelf closed when it comes back.
        thread.join(timeout=_FAREWELL_SECONDS)


def _fill(items: Iterable[T], shelf: _Shelf[T]) -> None:
    iterator = iter(items)
    try:
        for item in iterator:
            if not shelf.put(item):
                break
        shelf.end(None)
    except BaseException as error:
        shelf.end(error)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class _Shelf(Generic[T]):
    """A bounded queue with an end on either side; no one polls."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room and add an item; False when nobody will take it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None) -> None:
        """Say that no more items come, and why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no more items will be taken."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def taken(self) -> Iterator[T]:
        """Yield the items until the end, then raise what ended them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

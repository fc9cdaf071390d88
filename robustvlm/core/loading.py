"""While a program gets ready: imports at the price of the imports alone, and whom to tell how far it is."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Told = Callable[[int, int, "float | None"], None]
"""Is told how many texts are encoded, of how many, and the seconds left; 0 of 0 while another process encodes them."""

_told: ContextVar["Told | None"] = ContextVar("told", default=None)


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """Let somebody know how far the encoding of class prompts is, for as long as the block lasts.

    Example:
        >>> with telling(lambda done, total, left: print(done, "of", total)):
        ...     tell(256, 80_000, None)
        256 of 80000
    """
    before = _told.set(told)
    try:
        yield
    finally:
        _told.reset(before)


def tell(done: int, total: int, left: float | None) -> None:
    """Tell whoever wants to know."""
    told = _told.get()
    if told is not None:
        told(done, total, left)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Let the collector of cyclic garbage rest while modules are imported, which leave none.

    It would walk through all that was imported before again and again, a fifth of the processor time of a start. It is
    not for work of any other kind: tensors that hang in a cycle would pile up.

    Example:
        >>> with quick_imports():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()

"""Telling out-of-memory apart from other failures."""

from __future__ import annotations

# The fourth is oneDNN's, the others are those of PyTorch, CUDA's libraries and C++.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a primitive",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host ran out of memory.

    Told by name and message, so that asking does not load torch.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
        >>> is_out_of_memory(RuntimeError("shapes do not match"))
        False
    """
    text = str(error).lower()
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in text for sign in _SIGNS)

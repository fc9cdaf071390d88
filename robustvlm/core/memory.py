"""Telling out-of-memory apart from other failures."""

from __future__ import annotations

# What torch's backends say: CUDA, MPS, XPU and the CPU's allocator; C++; oneDNN, cuBLAS, cuDNN, cuSOLVER.
_SIGNS = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "could not create a primitive",
    "could not create a memory object",
    "alloc_failed",
    "invalid buffer size",
    "buffer size too large",
    "not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a device or the host ran out of memory.

    Told by name and message, so that asking does not load torch.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
        >>> is_out_of_memory(RuntimeError("could not create a primitive")), is_out_of_memory(RuntimeError("bad shape"))
        (True, False)
    """
    text = str(error).lower()
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or any(sign in text for sign in _SIGNS)

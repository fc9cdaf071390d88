"""The identity of a model: a digest of its weights and of what else decides its output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch


def fingerprint(state: Mapping[str, object], extra: Iterable[str] = ()) -> str:
    """Return a 32-digit hex BLAKE2b digest of names, shapes, dtypes and bytes of `state`, and of the texts in `extra`.

    The order of the entries, the device and the memory layout do not matter; every value does. Entries that are no
    tensors count by their `repr`.

    Example:
        >>> a = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
        >>> fingerprint(a) == fingerprint({"b": torch.zeros(2), "w": torch.ones(3, 2).T})
        True
        >>> fingerprint(a) == fingerprint({"b": torch.zeros(2), "w": torch.ones(3, 2)})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            _add(digest, f"{name} {value.dtype} {tuple(value.shape)}".encode())
            _add(digest, _raw(value))
        else:
            _add(digest, f"{name} {value!r}".encode())
    for text in extra:
        _add(digest, text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _add(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    # The length goes first, so that no two lists of parts are the same stream of bytes.
    digest.update(len(part).to_bytes(8, "big"))
    digest.update(part)

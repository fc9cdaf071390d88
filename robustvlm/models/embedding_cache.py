"""Class embeddings kept between calls (in memory) and between runs (in the user's cache folder)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

_KEPT_IN_MEMORY = 16
_memory: OrderedDict[str, torch.Tensor] = OrderedDict()


def cache_key(parts: Iterable[str]) -> str:
    """Return a hex digest of `parts`, each told apart from its neighbours.

    Example:
        >>> cache_key(["ab", "c"]) == cache_key(["a", "bc"])
        False
    """
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        text = part.encode("utf-8", "surrogateescape")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def cache_file(key: str) -> Path:
    """Return where the embeddings of `key` are kept on disk."""
    return Path(platformdirs.user_cache_dir("robustvlm")) / "class-embeddings" / f"{key}.safetensors"


def load_embeddings(key: str, rows: int) -> torch.Tensor | None:
    """Return the unit embeddings [rows, D] kept under `key`, or None when there are none or the file is damaged."""
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    try:
        found = load_file(cache_file(key))["class_embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    if found.dtype != torch.float32 or found.ndim != 2 or len(found) != rows:
        return None
    # Not a guard against NaN alone: flipped bits in a file that still parses are caught as well, as a rule.
    if not torch.allclose(found.norm(dim=-1), torch.ones(rows), atol=1e-4):
        return None
    _remember(key, found)
    return found


def save_embeddings(key: str, embeddings: torch.Tensor) -> None:
    """Keep `embeddings` [K, D] under `key`; a folder that cannot be written to costs only the time saved."""
    embeddings = embeddings.detach().cpu().contiguous()
    _remember(key, embeddings)
    file = cache_file(key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(file, save({"class_embeddings": embeddings}))


def forget_embeddings() -> None:
    """Empty the memory, not the disk."""
    _memory.clear()


def _remember(key: str, embeddings: torch.Tensor) -> None:
    _memory[key] = embeddings
    while len(_memory) > _KEPT_IN_MEMORY:
        _memory.popitem(last=False)


def _write_whole(file: Path, content: bytes) -> None:
    # Another process sees the old file or the new one, never half of it.
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

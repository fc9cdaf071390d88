"""Class embeddings kept between calls (in memory) and between runs (in the user's cache folder), whole or in parts.

Of several processes that want the same ones, one computes them and the others wait; a process that is killed leaves
what it has computed to the next.
"""

import contextlib
import hashlib
import io
import os
import struct
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import platformdirs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from robustvlm.core.loading import tell
from robustvlm.core.object_graph import fingerprint

_KEPT_IN_MEMORY = 16
_Item = TypeVar("_Item")
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
    """Return the embeddings [rows, D] kept under `key`, or None when there are none or the file is damaged."""
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    try:
        with safe_open(cache_file(key), framework="pt") as file:
            found, told = file.get_tensor("class_embeddings"), file.metadata() or {}
    except (OSError, SafetensorError, KeyError):
        return None
    if found.dtype != torch.float32 or found.ndim != 2 or len(found) != rows:
        return None
    # Bits may have flipped in a file that still parses.
    if told.get("digest") != fingerprint({"class_embeddings": found}):
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
        content = {"class_embeddings": embeddings}
        _write_whole(file, save(content, metadata={"digest": fingerprint(content)}))


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


# Embeddings in parts, as they are computed; and one process at a time that computes them

_HEAD = struct.Struct("<16sIII")  # digest, first class, classes, length of an embedding
_POLL = 0.2  # seconds between two looks at whether another process is done


def embeddings_of(
    key: str, rows: int, make: Callable[["Parts | None"], torch.Tensor], *, in_parts: bool
) -> torch.Tensor:
    """Return the embeddings [rows, D] of `key`: kept ones, else those that `make` returns, which are kept if finite.

    Args:
        make: computes them from the parts that are there, and adds to these.
        in_parts: it is so long a work that parts are kept, and that another process is waited for that is at it.
    """
    known = load_embeddings(key, rows)
    if known is not None:
        return known
    with _held(key) if in_parts else contextlib.nullcontext() as parts:
        # Another process may have been at it.
        known = load_embeddings(key, rows) if parts else None
        if known is None:
            known = make(parts)
            if torch.isfinite(known).all():
                save_embeddings(key, known)
        if parts:
            parts.needless()
    return known


class Parts:
    """A file of embeddings of the first classes, batch by batch, each with its digest; what is broken is dropped.

    Example:
        >>> file = io.BytesIO()
        >>> Parts(file).add(torch.ones(2, 3), first=0)
        >>> [part.shape for part in Parts(file).read([2, 2])]
        [torch.Size([2, 3])]
    """

    def __init__(self, file: io.BytesIO | io.FileIO, path: Path | None = None) -> None:
        self._file, self._path = file, path
        self._open = True

    def read(self, counts: Sequence[int]) -> list[torch.Tensor]:
        """Return the parts that are whole, float32 [count, D] each; `counts` are the classes of all parts there can be.

        What follows a broken part, or one of other classes, is cut off.
        """
        found: list[torch.Tensor] = []
        self._file.seek(0)
        content, place, first = self._file.read(), 0, 0
        for count in counts:
            head, start = content[place : place + _HEAD.size], place + _HEAD.size
            if len(head) < _HEAD.size:
                break
            digest, of, classes, dim = _HEAD.unpack(head)
            body = content[start : start + 4 * classes * dim]
            if (of, classes) != (first, count) or digest != _digest(of, classes, dim, body):
                break
            found.append(torch.from_numpy(np.frombuffer(body, "<f4").astype(np.float32).reshape(classes, dim)))
            place, first = start + len(body), first + count
        with contextlib.suppress(OSError):
            self._file.truncate(place)
        self._file.seek(place)
        return found

    def add(self, embeddings: torch.Tensor, *, first: int) -> None:
        """Add the next part [count, D], whose first class is number `first`; nothing where that cannot be done."""
        self._open = self._open and embeddings.dtype == torch.float32 and bool(torch.isfinite(embeddings).all())
        if not self._open:
            return
        body, (count, dim) = embeddings.detach().cpu().numpy().astype("<f4").tobytes(), embeddings.shape
        record = _HEAD.pack(_digest(first, count, dim, body), first, count, dim) + body
        try:
            self._open = self._file.write(record) == len(record)
        except OSError:  # a full disk costs the resumption alone
            self._open = False

    def needless(self) -> None:
        """Delete the file: all embeddings are kept elsewhere, or none of them is any good."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()


def in_batches(
    items: Sequence[_Item],
    size: int,
    encode: Callable[[Sequence[_Item]], torch.Tensor],
    *,
    parts: Parts | None = None,
    texts_each: int = 1,
) -> torch.Tensor:
    """Return the rows of all items, `encode` of `size` items at a time, without those that are in `parts` already.

    How texts are batched may decide the last bits of their embeddings: parts are whole batches.

    Args:
        texts_each: texts that an item stands for, for whoever is told how far the work is.

    Example:
        >>> in_batches([1.0, 2.0, 3.0], 2, lambda batch: torch.tensor(batch)[:, None]).flatten()
        tensor([1., 2., 3.])
    """
    batches = [items[start : start + size] for start in range(0, len(items), size)]
    rows = parts.read([len(batch) for batch in batches]) if parts else []
    done = known = sum(map(len, rows))
    began = time.monotonic()
    for batch in batches[len(rows) :]:
        found = encode(batch)
        rows.append(found)
        if parts:
            parts.add(found, first=done)
        done += len(batch)
        if len(batches) > 1:
            left = (time.monotonic() - began) / (done - known) * (len(items) - done)
            tell(done * texts_each, len(items) * texts_each, left)
    return torch.cat([row.to(rows[-1].device) for row in rows])


def _digest(first: int, count: int, dim: int, body: bytes) -> bytes:
    return hashlib.blake2b(struct.pack("<III", first, count, dim) + body, digest_size=16).digest()


@contextlib.contextmanager
def _held(key: str) -> Iterator[Parts | None]:
    """Yield the parts of `key` to one process at a time; None where files cannot be written or locked."""
    path = cache_file(key).with_suffix(".part")
    file = None
    with contextlib.suppress(OSError, ImportError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    if file is None:
        yield None
        return
    with file:
        yield Parts(file, path)


def _locked(path: Path) -> io.FileIO:
    """Open a file that no other process has open this way, waiting for one that has.

    The operating system frees the lock when a process dies, however it dies.
    """
    import fcntl

    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        file = os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0)
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    tell(0, 0, None)
                    time.sleep(_POLL)
            # Whoever had the lock may have deleted the file meanwhile: then the lock of this one keeps nobody out.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()

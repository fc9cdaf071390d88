"""Where WebDataset shards lie: local tar files, folders of them, and http(s) addresses."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from robustvlm.core.foreign_text import HIDDEN, without_secrets
from robustvlm.core.network import Deadline, SteadyStream, open_url
from robustvlm.data.specs import Spec
from robustvlm.data.splits import chosen_split, is_junk, one_split
from robustvlm.errors import UserError

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_TIMEOUT = 60
"""Seconds to the first byte, and for every read after it, however slowly its bytes come in."""


@dataclass(frozen=True)
class Shard:
    """One tar file, local or at an http(s) address; `name` is unique among the shards of a source."""

    name: str
    address: str

    @property
    def path(self) -> Path | None:
        """The local file, or None for an address on the net."""
        return None if "://" in self.address else Path(self.address)

    @property
    def size(self) -> int:
        """Bytes of a local file, -1 on the net."""
        return self.path.stat().st_size if self.path else -1

    def open(self) -> IO[bytes]:
        """Open the shard for reading from start to end."""
        if self.path:
            return self.path.open("rb")
        deadline = Deadline(_TIMEOUT)
        return io.BufferedReader(SteadyStream(open_url(self.address, deadline), deadline, wait=_TIMEOUT), 2**16)


def find_shards(spec: Spec) -> list[Shard]:
    """Return the shards a spec names; `{000..007}` is expanded, a folder gives its tar files, sorted.

    Only files and http(s) addresses are read: other schemes of WebDataset run programs.

    Raises:
        UserError: another scheme, no such file, or a folder without tar files.
    """
    if not spec.rest:
        raise UserError("'wds' names no shard: write wds:PATH or wds:URL, for example wds:data/test-{000..007}.tar")
    split = spec.options.get("split")
    addresses = [address for pattern in _expand(spec.rest) for address in _resolve(pattern, split)]
    stems = [_stem(address) for address in addresses]
    twice = Counter(stems)
    names = [stem if twice[stem] == 1 else f"{i:05d}-{stem}" for i, stem in enumerate(stems)]
    return [Shard(name, address) for name, address in zip(names, addresses, strict=True)]


def _expand(text: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(text))
    except ValueError:
        raise UserError(f"the braces of '{text}' are not balanced: write for example {{000..007}}") from None


def _resolve(address: str, split: str | None) -> list[str]:
    scheme = address.partition(":")[0].lower()
    if address.lower().startswith(("http://", "https://")):
        if HIDDEN in address:
            raise UserError(
                f"'{address}' was stored without its password or signature: give the whole address in the command"
            )
        return [address]
    if address.lower().startswith("file://"):
        address = address[7:]
    elif "://" in address or scheme == "pipe":
        raise UserError(f"shards are read from files and http(s) addresses, got '{address}': download or mount them")
    path = Path(address).expanduser()
    if path.is_dir():
        found = _tars(path)
        if not found:
            path, _ = chosen_split(path, split)
            found = _tars(path)
        else:
            found = one_split(found, split, path)
        if not found:
            raise UserError(f"the folder {path} holds no tar file")
        return sorted(map(str, found))
    if split is not None:
        raise UserError(f"{path} is no folder: leave out ?split={split}, or pass the folder above")
    if not path.is_file():
        raise UserError(f"no shard {path}")
    return [str(path)]


def _tars(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.endswith(_SUFFIXES) and not is_junk(file.name)]


def _stem(address: str) -> str:
    name = without_secrets(address).partition("?")[0].rstrip("/").rpartition("/")[2]
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.endswith(suffix)), name)

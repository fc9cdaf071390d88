"""Seeded damage: to bytes, to the values of a JSON file, to files as such."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000
HUGE = int("9" * 400)

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 5, HUGE, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[31mred", "é" * 300,
    [], [[]], [1, None], {}, {"a": {}}, "../../x", "/etc/passwd",
)  # fmt: skip
"""What a value is replaced by: every JSON type, numbers that are none, texts that no terminal or path takes."""


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Return the bytes cut short, with bits flipped, with a part missing, doubled or overwritten."""
    if not content:
        return draws.randbytes(20)
    kind, at = draws.randrange(6), draws.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(draws.choice((1, 4, 64))):
            changed[draws.randrange(len(changed))] ^= 1 << draws.randrange(8)
        return bytes(changed)
    length = min(len(content) - at, draws.choice((1, 8, 512)))
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + content[at : at + length] + content[at:]
    if kind == 4:
        return content[:at] + draws.randbytes(length) + content[at + length :]
    head = min(len(content), 16)  # the head, where formats keep their lengths
    changed = bytearray(content)
    changed[draws.randrange(head)] = draws.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(changed)


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in parsed JSON; of long lists the first two."""
    if here:
        yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*here, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:2]):
            yield from paths(inner, (*here, index))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    """Return a copy with the value at this path replaced, or left out where `by` is Ellipsis."""
    value = copy.deepcopy(value)
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    if by is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = by
    return value


def mistaken_json(text: str, draws: random.Random) -> tuple[str, str]:
    """Return JSON with one value replaced by another or left out, and a word on what was done."""
    value = json.loads(text)
    places = sorted(paths(value), key=lambda path: (len(path), str(path)))
    # Half of the draws near the top, where the meaning is; the rest anywhere.
    near = [path for path in places if len(path) <= 2]
    path = draws.choice(near if near and draws.random() < 0.5 else places)
    by = draws.choice((..., *VALUES))
    return json.dumps(
        replaced(value, path, by)
    ), f"{'.'.join(map(str, path))} = {'left out' if by is ... else repr(by)[:30]}"


def strange_file(path: Path, kind: str) -> None:
    """Put something else in place of a file.

    Args:
        kind: one of `STRANGE`.
    """
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    texts = {
        "empty": b"",
        "deep": DEEP.encode(),
        "random": random.Random(7).randbytes(4000),
        "zeros": bytes(4000),
        "utf16": "apple\ndog\n".encode("utf-16"),
        "surrogates": b'["apple", "\\ud800"]',
        "latin1": "pomme\ncit\xe9\n".encode("latin-1"),
        "long": b"x" * 1_000_000,
        "brackets": b"{}",
        "list": b"[1, 2, 3]",
        "number": b"5",
        "huge": b"9" * 5000,
    }
    if kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("nowhere at all")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "missing":
        raise ValueError(kind)


STRANGE = (
    "empty", "deep", "random", "zeros", "utf16", "surrogates", "latin1", "long", "brackets", "list", "number", "huge",
    "folder", "fifo", "loop", "nowhere", "device", "missing",
)  # fmt: skip
"""Kinds of `strange_file`."""

NEVER_RIGHT = frozenset(STRANGE) - {"long", "random", "zeros", "latin1", "utf16", "number", "huge"}
"""Kinds that must be refused even where some text is expected, of which the others may be examples."""

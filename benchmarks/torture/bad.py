"""One bad input, and the good files that stand beside it."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.torture.mutate import strange_file


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Args:
        kind: what sort of input, for the table.
        what: what is wrong with it.
        line: the command that meets it.
        spoil: makes the input, in the place where the command will run.
        wrong: whether nothing but a refusal is right; otherwise it may also be taken as it is.
        needs: the commands whose results must lie there.
        clue: where exit code 0 is right as long as the output says this.
    """

    kind: str
    what: str
    line: str
    spoil: Callable[[Path], object] = lambda _: None
    wrong: bool = False
    needs: tuple[str, ...] = ()
    clue: str | None = None


NAMES = ("apple", "dog", "house")


def write_good_files(place: Path) -> None:
    """Write a good image folder, Parquet file, shard and lists of names, templates and classes by level."""
    draws = random.Random(1)
    rows = []
    for name in NAMES:
        folder = place / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            colour = tuple(draws.randrange(256) for _ in range(3))
            Image.new("RGB", (20, 16), colour).save(folder / f"{number}.png")
            rows.append((folder / f"{number}.png", NAMES.index(name)))
    contents = [path.read_bytes() for path, _ in rows]
    pq.write_table(pa.table({"image": contents, "label": [label for _, label in rows]}), place / "photos.parquet")
    with tarfile.open(place / "photos.tar", "w") as archive:
        for number, (content, (_, label)) in enumerate(zip(contents, rows, strict=True)):
            for suffix, data in (("png", content), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    (place / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (place / "templates.txt").write_text("a photo of a {}\n")
    (place / "tree.json").write_text(json.dumps({"thing": {"living": ["apple", "dog"], "built": ["house"]}}))


IMAGES = "--data imagefolder:photos"
READS = {
    "evaluate": "evaluate tiny --device cpu",
    "data": "data imagefolder:photos --check",
    "attack": "attack tiny --attack fgsm --eps 1/255 --limit 4 --checks none --device cpu --name bad",
}


def writing(name: str, content: str | bytes) -> Callable[[Path], object]:
    def spoil(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
        )

    return spoil


def strange(name: str, kind: str) -> Callable[[Path], object]:
    return lambda place: strange_file(place / name, kind)

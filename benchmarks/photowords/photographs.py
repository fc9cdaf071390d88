"""One photograph of every ImageNet-1k class as a Parquet file, from a copy of the repository that gathers them.

    git clone https://github.com/EliSchwartz/imagenet-sample-images
    python -m benchmarks.photowords.photographs imagenet-sample-images runs/photowords/photographs.parquet

The shorter side becomes 256 pixels, the central 224 x 224 are kept, as JPEG of quality 90: 18 MB. The photographs are
ImageNet's: they are for measuring at home, not for passing on.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common import exit_code_of
from robustvlm.core.files import replacing
from robustvlm.data.classes import wordnet_names
from robustvlm.errors import UserError

REPOSITORY = "https://github.com/EliSchwartz/imagenet-sample-images"
SIDE, AROUND, QUALITY = 224, 256, 90
_ROWS = 100


@dataclass(frozen=True)
class Photograph:
    """The bytes of a picture and the name of what it shows."""

    data: bytes
    class_name: str


def from_repository(folder: Path) -> Iterator[Photograph]:
    """Yield the photographs of a copy of the repository: a work tree, or a clone without one.

    Raises:
        UserError: the folder holds no photograph named after a WordNet id.
    """
    names = wordnet_names()
    files = {path.name: path for path in sorted(folder.glob("n*_*.JPEG"))}
    listed = sorted(files) or _git(folder, "ls-tree", "--name-only", "HEAD").decode().split()
    known = [name for name in sorted(listed) if name.endswith(".JPEG") and name.split("_")[0] in names]
    if not known:
        raise UserError(f"{folder} holds no n01440764_tench.JPEG or the like: clone {REPOSITORY} and pass its folder")
    for name in known:
        data = files[name].read_bytes() if files else _git(folder, "show", f"HEAD:{name}")
        yield Photograph(cropped(data), names[name.split("_")[0]])


def _git(folder: Path, *command: str) -> bytes:
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else b""


def cropped(data: bytes) -> bytes:
    """Return a picture's centre, 224 pixels square, as JPEG.

    Example:
        >>> wide = io.BytesIO()
        >>> Image.new("RGB", (600, 300)).save(wide, "PNG")
        >>> Image.open(io.BytesIO(cropped(wide.getvalue()))).size
        (224, 224)
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = AROUND / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    out = io.BytesIO()
    image.crop((left, top, left + SIDE, top + SIDE)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def from_parquet(path: Path) -> list[Photograph]:
    """Return the pictures of a Parquet file as they are, with the names of its schema.

    Raises:
        UserError: not a file of images with class names that robustvlm reads.
    """
    from robustvlm.data import open_data
    from robustvlm.data.parquet import find_columns

    names = open_data(f"parquet:{path}").class_names
    file = pq.ParquetFile(path)
    columns = find_columns(file.schema_arrow, None, None, str(path))
    if columns.text_labels:
        raise UserError(f"{path}: labels are expected to be numbers with class names in the schema, they are texts")
    table = file.read(columns=[columns.image, columns.label]).to_pydict()
    pictures = (image["bytes"] if isinstance(image, dict) else image for image in table[columns.image])
    return [Photograph(data, names[label]) for data, label in zip(pictures, table[columns.label], strict=True)]


def write_parquet(path: Path, photographs: Sequence[Photograph], class_names: Sequence[str]) -> None:
    """Write pictures and their labels, with the class names in the schema as Hugging Face's `datasets` has them."""
    place = {name: label for label, name in enumerate(class_names)}
    features = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"image": {"bytes": item.data}, "label": place[item.class_name]} for item in photographs]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema), partial, compression="none", row_group_size=_ROWS)


def gathered(source: Path) -> list[Photograph]:
    """Return the photographs of a Parquet file or of a copy of the repository.

    Raises:
        UserError: neither is there.
    """
    if not source.exists():
        raise UserError(f"no file or folder {source}: clone {REPOSITORY} and pass its folder")
    return list(from_repository(source)) if source.is_dir() else from_parquet(source)


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photowords.photographs")
    parser.add_argument("repository", type=Path, help=f"a copy of {REPOSITORY}")
    parser.add_argument("out", type=Path, help="the Parquet file to write")
    given = parser.parse_args(argv)
    return exit_code_of(lambda: run(given))


def run(given: argparse.Namespace) -> None:
    """Gather the photographs into one file."""
    found = gathered(given.repository)
    write_parquet(given.out, found, list(wordnet_names().values()))
    print(f"{len(found)} photographs, {given.out.stat().st_size / 1e6:.1f} MB: {given.out}")


if __name__ == "__main__":
    sys.exit(main())

"""Every command on a real encoder and real photographs, in one table.

    python -m benchmarks.photowords --photographs imagenet-sample-images

The photographs are a copy of github.com/EliSchwartz/imagenet-sample-images or a Parquet file made of it. Finished rows
are kept in the folder of --out and not made again; a row that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import robustvlm as rv
from benchmarks.common import exit_code_of, markdown
from robustvlm.core.files import write_text
from robustvlm.data import open_data
from robustvlm.data.trees import Forest, save_forest
from robustvlm.errors import UserError, nearest

from .model import TEMPLATE
from .parts import divided, far_level, write_parts
from .photographs import REPOSITORY, gathered, write_parquet
from .readings import Reading
from .rows import QUICK, Row, Setting, Sizes, only, rows

MODEL = "benchmarks.photowords.model:load"


def prepared(photographs: Path, folder: Path) -> int:
    """Write the parts of the photographs unless they are there; return the level of superclass goals.

    Raises:
        UserError: no photographs, or classes without a tree.
    """
    whole = folder / "photographs.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "templates.txt", TEMPLATE + "\n")
    if not whole.exists():
        found = gathered(photographs)
        first = folder / "all.parquet"
        names = open_data(f"parquet:{photographs}").class_names if photographs.is_file() else None
        write_parquet(first, found, names or sorted({item.class_name for item in found}))
        source = open_data(f"parquet:{first}")
        if source.tree is None:
            raise UserError(f"{photographs}: the classes are not ImageNet's, so there is no tree over them")
        tree = source.tree[0]
        parts = divided(tree)
        save_forest(Forest((tree.restrict(parts.known),)), folder / "known-tree.json")
        write_parts(found, source.class_names, parts, folder)
        first.unlink()
    tree_of_all = open_data(f"parquet:{whole}").tree
    assert tree_of_all is not None
    return far_level(tree_of_all[0])


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Return the readings of a row, its command and its seconds; from the folder if they are there."""
    path = folder / f"{row.key}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["command"] == row.command:
            return kept
    started, cpu = time.monotonic(), time.process_time()
    print(f"$ {row.command}", file=sys.stderr, flush=True)
    result = getattr(rv, row.verb)(**row.options)
    found = {
        "key": row.key,
        "of": row.of,
        "command": row.command,
        "seconds": round(time.monotonic() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
        "readings": [asdict(item) for item in row.read(result)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown, and the commands of its rows below it."""
    lines = []
    for row in found:
        for number, reading in enumerate(Reading(**item) for item in row["readings"]):
            first = [row["of"], f"`{row['key']}`", f"{row['cpu']:.0f}"] if not number else ["", "", ""]
            lines.append([*first, reading.what, reading.value, reading.images or ""])
    header = ["model", "row", "CPU seconds", "what", "value (95 % interval)", "images"]
    commands = "\n".join(f"{row['key']}: {row['command']}" for row in found)
    return f"{markdown(header, lines)}\n\n```sh\n{commands}\n```"


def main(argv: list[str] | None = None) -> int:
    """Command line; user errors end in one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photowords", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photographs", type=Path, required=True, help=f"a copy of {REPOSITORY}, or a Parquet file")
    parser.add_argument("--out", type=Path, default=Path("runs/photowords"), help="folder of parts, runs and rows")
    parser.add_argument("--quick", action="store_true", help="few images and steps, to see that everything runs")
    parser.add_argument("--rows", help="these rows alone, with commas between")
    parser.add_argument("--model", default=MODEL, help="another model for the same table")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    return exit_code_of(lambda: run(given))


def run(given: argparse.Namespace) -> None:
    """Make the rows that are missing and print the table."""
    import torch

    torch.set_num_threads(given.threads)
    out: Path = given.out / "quick" if given.quick else given.out
    level = prepared(given.photographs, given.out / "data")
    setting = Setting(given.model, given.out / "data", out, QUICK if given.quick else Sizes(), level)
    every = list(rows(setting))
    for key in (given.rows or "").split(",") if given.rows else ():
        if key not in [row.key for row in every]:
            raise UserError(f"there is no row '{key}': {nearest(key, [row.key for row in every])}")
    print(table([measure(row, out / "rows") for row in only(iter(every), given.rows)]))


if __name__ == "__main__":
    sys.exit(main())

"""Is an attack's answer the same after SIGKILL and resume, and for every number of lanes? Prints a Markdown table.

    python -m benchmarks.resume_check --limit 200

Runs `robustvlm attack` straight through, then once more with the process killed at random points of its journal, and
compares all result rows except their timings. Other lane counts may differ by rounding: their flips are counted.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import clock, markdown

_HEADER = ("run", "rows", "rows that differ", "images flipped", "largest change of margin", "seconds")


def main() -> int:
    """Compare the runs; return 1 when a killed run ends with other rows."""
    options = _options()
    out = Path(options.out or tempfile.mkdtemp())
    with clock() as clean:
        _run(options, out, "straight", options.lanes[-1])
    straight = _rows(out / "straight")
    print(f"`{' '.join(_command(options, out, 'NAME', options.lanes[-1])[1:])}`\n")
    table = [_compared(f"straight, lanes {options.lanes[-1]}", straight, straight, clean.seconds)]

    points = _kill_points(out / "straight" / "journal.jsonl", options.kills, random.Random(options.draw))
    with clock() as killed:
        reached = [_killed(options, out, lines) for lines in points]
        _run(options, out, "killed", options.lanes[-1])
    resumed = _rows(out / "killed")
    table.append(_compared(f"killed after {', '.join(map(str, reached))} lines", resumed, straight, killed.seconds))

    for lanes in options.lanes[:-1]:
        with clock() as other:
            _run(options, out, f"lanes{lanes}", lanes)
        table.append(_compared(f"lanes {lanes}", _rows(out / f"lanes{lanes}"), straight, other.seconds))
    print(markdown(_HEADER, table))
    return 0 if resumed.equals(straight) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--attack", default="pgd")
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 7, 64], help="the last one is the run to kill")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--draw", type=int, default=None, help="seed of the points at which to kill")
    parser.add_argument("--out", default=None, help="folder for the runs [default: a temporary one]")
    return parser.parse_args()


def _command(options: argparse.Namespace, out: Path, name: str, lanes: int) -> list[str]:
    settings = {
        "data": options.data,
        "attack": options.attack,
        "eps": options.eps,
        "limit": options.limit,
        "seed": options.seed,
        "precision": options.precision,
        "device": options.device,
        "lanes": lanes,
        "out": out,
        "name": name,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "robustvlm", "attack", options.model, *words]


def _run(options: argparse.Namespace, out: Path, name: str, lanes: int) -> None:
    subprocess.run(_command(options, out, name, lanes), check=True, stdout=subprocess.DEVNULL)


def _kill_points(journal: Path, count: int, draws: random.Random) -> list[int]:
    """Return rising numbers of journal lines; the last lines are left out, since the process ends with them."""
    lines = journal.read_bytes().count(b"\n")
    return sorted(draws.sample(range(1, lines - 2), count))


def _killed(options: argparse.Namespace, out: Path, lines: int) -> int:
    """Start or continue the run and kill it when its journal has so many lines; return how many it had."""
    journal = out / "killed" / "journal.jsonl"
    lines = max(lines, _lines(journal) + 1)  # a process that is killed late may have passed the next point already
    process = subprocess.Popen(_command(options, out, "killed", options.lanes[-1]), stdout=subprocess.DEVNULL)
    while process.poll() is None and _lines(journal) < lines:
        time.sleep(0.001)
    process.kill()
    if process.wait() == 0:
        raise SystemExit("the run ended before it could be killed: take a larger --limit")
    return _lines(journal)


def _lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _rows(folder: Path) -> pa.Table:
    return pq.read_table(folder / "results.parquet").drop_columns(["seconds"])


def _compared(name: str, found: pa.Table, expected: pa.Table, seconds: float) -> list[Any]:
    pairs = list(zip(found.to_pylist(), expected.to_pylist(), strict=True))
    flipped = {a["image_id"] for a, b in pairs if a["outcome"] != b["outcome"]}
    change = max(
        (abs(a["margin"] - b["margin"]) for a, b in pairs if a["outcome"] == b["outcome"] == "robust"), default=0
    )
    return [name, len(pairs), sum(a != b for a, b in pairs), len(flipped), f"{change:.2g}", f"{seconds:.0f}"]


if __name__ == "__main__":
    sys.exit(main())

"""Are N processes N times as fast as one, with the same results? Prints a Markdown table.

    python -m benchmarks.ranks --limit 400

Runs `robustvlm attack` in one process and then with `torchrun` in N, each process on one thread, and compares every
result row except its timings. Efficiency is t_1 / (N t_N), of the seconds that the runs themselves count: loading
Python, the model and the data comes before them, and is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import clock, markdown

_HEADER = ("processes", "seconds", "in the model", "with start", "passes", "efficiency", "rows that differ")


def main() -> int:
    """Time the runs; return 1 when the results differ or the efficiency is below the wanted one."""
    options = _options()
    out = Path(options.out or tempfile.mkdtemp())
    print(f"`{' '.join(_command(options, out, 1)[1:])}`\n")
    found = {size: _run(options, out, size) for size in (1, options.ranks)}
    one, many = (found[size][0]["cost"] for size in (1, options.ranks))
    efficiency = one["seconds"] / (options.ranks * many["seconds"])
    differ = _differences(out, options.ranks)
    rows = []
    for size, (summary, seconds) in found.items():
        cost = summary["cost"]
        passes = cost["forward_passes"] + cost["backward_passes"]
        times = (f"{cost['seconds']:.1f}", f"{cost['model_seconds']:.1f}", f"{seconds:.1f}")
        rows.append([size, *times, f"{passes:,}", *(("1", 0) if size == 1 else (f"{efficiency:.2f}", differ))])
    print(markdown(_HEADER, rows))
    return int(differ > 0 or efficiency < options.wanted)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--attack", default="apgd-ce,apgd-t")
    parser.add_argument("--eps", default="1/255")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--checks", default="none", help="extra attacks of --checks full are made by rank 0 alone")
    parser.add_argument("--lanes", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--wanted", type=float, default=0.85, help="efficiency below which the exit code is 1")
    parser.add_argument("--out", default=None, help="folder for the runs [default: a temporary one]")
    return parser.parse_args()


def _command(options: argparse.Namespace, out: Path, size: int) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    settings = {
        name: getattr(options, name) for name in ("data", "attack", "eps", "limit", "checks", "lanes", "device")
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    name = ["--out", str(out), "--name", f"ranks{size}"]
    return [sys.executable, *several, "-m", "robustvlm", "attack", options.model, *words, *name]


def _run(options: argparse.Namespace, out: Path, size: int) -> tuple[dict[str, dict[str, float]], float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with clock() as measured:
        subprocess.run(_command(options, out, size), check=True, stdout=subprocess.DEVNULL, env=environment)
    return json.loads((out / f"ranks{size}" / "summary.json").read_text()), measured.seconds


def _differences(out: Path, size: int) -> int:
    one, many = (pq.read_table(out / f"ranks{n}" / "results.parquet").drop_columns(["seconds"]) for n in (1, size))
    return 0 if one.equals(many) else sum(a != b for a, b in zip(_rows(one), _rows(many), strict=True))


def _rows(table: pa.Table) -> list[str]:
    return [str(row) for row in table.to_pylist()]  # as text: NaN, where there is no number, equals itself


if __name__ == "__main__":
    sys.exit(main())

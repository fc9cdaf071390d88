"""Peak memory of a whole `robustvlm attack` as the number of images grows.

python -m benchmarks.memory --images 100,1000,5000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.common import markdown


def main() -> None:
    """Run one attack per size, each in a process of its own, and print peak memory and time as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default="emoji?copies=50")
    parser.add_argument("--attack", default="fgsm")
    parser.add_argument("--images", default="100,1000,5000")
    options = parser.parse_args()
    rows = [_measure(options, int(count)) for count in options.images.split(",")]
    print(markdown(("images", "attacked", "peak memory, MiB", "seconds"), rows))


def _measure(options: argparse.Namespace, count: int) -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "robustvlm", "attack", options.model, "--data", options.data]
        command += ["--attack", options.attack, "--limit", str(count), "--out", folder, "--json"]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        output = process.stdout.read() if process.stdout else b""
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"the attack on {count} images failed with status {status}")
        images = json.loads(output)["images"]
    seconds = time.monotonic() - began
    return [images["evaluated"], images["clean_correct"], f"{usage.ru_maxrss / 1024:.0f}", f"{seconds:.0f}"]


if __name__ == "__main__":
    main()

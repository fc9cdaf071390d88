"""Run the equality tests (resumed = straight, ranks, budgets) as every kind of CPU computes, with one and two threads.

python tools/matrix/equality.py [words for pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CAPABILITIES = {"default": None, "avx2": "avx2", "avx512": "avx512f"}
"""What PyTorch may be told to use, and the flag of a CPU that has it."""

MKL = {"default": "SSE4_2", "avx2": "AVX2", "avx512": "AVX512"}
"""What its matrix products, which are Intel's MKL and not told by PyTorch, use on such a CPU."""


def available(flags: set[str]) -> list[str]:
    """Return the capabilities that a CPU with these flags has.

    Example:
        >>> available({"sse4_2", "avx2"})
        ['default', 'avx2']
    """
    return [name for name, flag in CAPABILITIES.items() if flag is None or flag in flags]


def cpu_flags() -> set[str]:
    """Return the flags of this machine's CPU, as Linux knows them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def main() -> int:
    """Run the tests under every setting; return 1 if one fails."""
    failed = []
    for capability in available(cpu_flags()):
        for threads in ("1", "2"):
            setting = {"ATEN_CPU_CAPABILITY": capability, "MKL_ENABLE_INSTRUCTIONS": MKL[capability]}
            setting |= {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
            print(" ".join(f"{key}={value}" for key, value in setting.items()), flush=True)
            command = [sys.executable, "-m", "pytest", "-q", "-m", "equality and not slow", *sys.argv[1:]]
            if subprocess.run(command, env=os.environ | setting, check=False).returncode:
                failed.append(f"{capability}, {threads} thread(s)")
    print(f"equality tests failed under: {'; '.join(failed) or 'nothing'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

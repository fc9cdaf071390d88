"""Build robustvlm/assets/certify/ell.json: calibrated local levels of the order-statistics band (a few minutes).

Usage: python tools/build_ell_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

from robustvlm.certify.bands import calibrate

SIZES = (100, 200, 400, 450, 500, 800, 900, 1000, 1800, 2000, 4000, 4500, 5000, 8000, 9000, 10_000, 18_000, 20_000)
ALPHAS = (0.05, 0.025, 0.01, 0.005, 0.001, 0.0005, 0.00025, 0.0001)
TARGET = Path(__file__).resolve().parents[1] / "robustvlm" / "assets" / "certify" / "ell.json"


def main() -> None:
    """Compute every level and write the table."""
    levels: dict[str, float] = {}
    for n in SIZES:
        for alpha in ALPHAS:
            levels[f"{n}:{alpha!r}"] = calibrate(n, alpha)
        print(f"n = {n}: {levels[f'{n}:{ALPHAS[4]!r}']:.6g} at alpha {ALPHAS[4]}", flush=True)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(levels, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Build robustvlm/assets/certify/t4.safetensors: least norms for the vector certificate (about two minutes).

Usage: python tools/build_t4_table.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from robustvlm.certify.feature import required_norm

COSINES = np.append(np.round(np.arange(0.0, 0.995, 0.01), 2), [0.995, 0.999])
SHIFTS = np.round(np.arange(0.0, 4.0001, 0.01), 2)
TARGET = Path(__file__).resolve().parents[1] / "robustvlm" / "assets" / "certify" / "t4.safetensors"


def main() -> None:
    """Evaluate the certificate on the grid, round up, force monotone rows and columns, write."""
    norms = np.array([[required_norm(float(cos0), float(a)) for a in SHIFTS] for cos0 in COSINES])
    norms = np.maximum.accumulate(np.maximum.accumulate(norms, axis=1), axis=0)
    steps = np.minimum(np.ceil(norms * 65536.0), 65535.0).astype(np.uint16)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    tables = {"cosines": COSINES, "shifts": SHIFTS, "norm_steps": steps}
    save_file(tables, TARGET, metadata={"theorem": "T4", "unit": "2^-16, rounded up; 65535: none"})
    print(f"{steps.shape} -> {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()

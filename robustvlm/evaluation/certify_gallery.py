"""Keeps the images that were hardest and easiest to certify, each with a noisy copy, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from robustvlm.core.framing import Framing
from robustvlm.core.seeds import generator
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample
from robustvlm.runs.files import replacing

ENDS = 6


def save_extremes(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    source: DataSource,
    *,
    framing: Framing,
    sigma: float,
    seed: int,
) -> None:
    """Write the `ENDS` images with the smallest and the largest radii to `folder`, clean and under their noise.

    Among equal radii, as of a test at one radius, the images that took more copies count as smaller.

    Args:
        folder: made if need be; a file per image, named by its number.
        rows: of the results: index, image_id, label, prediction, radius, n.
        framing: how the run brought images to the resolution where the noise is added.
        sigma, seed: noise level and run seed; the noise shown is drawn from a stream of its own.
    """
    order = sorted(rows, key=lambda row: (row["radius"], -row["n"], row["index"]))
    chosen = {row["image_id"]: row for row in (order if len(order) <= 2 * ENDS else order[:ENDS] + order[-ENDS:])}
    if not chosen:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for item in source.samples(keep=lambda name: name in chosen):
        row = chosen.pop(item.id, None)
        if row is None or not isinstance(item, Sample):
            continue
        clean = to_pixels(item.image, framing)
        noise = torch.randn(clean.shape, generator=generator(seed, item.id, "noise that is shown"))
        facts = {key: str(row.get(key)) for key in ("image_id", "index", "label", "prediction", "radius", "n")}
        content = save({"clean": clean.contiguous(), "noisy": (clean + sigma * noise).contiguous()}, metadata=facts)
        with replacing(folder / f"{int(row['index']):06d}.safetensors") as temporary:
            temporary.write_bytes(content)
        if not chosen:
            return

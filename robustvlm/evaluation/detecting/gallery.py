"""Keeps the images that a score takes most wrongly: unknown ones it likes best, known ones it likes least."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import save

from robustvlm.core.framing import Framing
from robustvlm.data.pixels import to_pixels
from robustvlm.data.source import DataSource, Sample
from robustvlm.evaluation.detecting.summarising import Scored
from robustvlm.runs.files import replacing

SHOWN = 6
"""Images per set."""


def save_mistakes(
    folder: Path,
    pairs: Sequence[tuple[Scored, DataSource]],
    score: str,
    threshold: float,
    *,
    framing: Framing,
) -> None:
    """Write the images to `folder`, each with its facts: set, id, score, label, prediction.

    Args:
        pairs: sets with their sources, that of known images first.
        score: by which images are judged; those on the right side of its threshold are no mistakes.
        framing: how images are brought to the model's resolution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (part, source) in enumerate(pairs):
        values = part.scores[score]
        known = number == 0
        order = np.argsort(values if known else -values, kind="stable")
        wrong = [int(row) for row in order if (values[row] <= threshold) == known][:SHOWN]
        rank = {part.ids[row]: place for place, row in enumerate(wrong)}
        rows = {part.ids[row]: row for row in wrong}
        for item in source.samples(keep=lambda name, wanted=rank: name in wanted):  # type: ignore[misc]
            if not isinstance(item, Sample) or item.id not in rank:
                continue
            row = rows[item.id]
            about = {
                "set": part.name,
                "known": str(int(known)),
                "rank": str(rank[item.id]),
                "image_id": item.id,
                "score": repr(float(values[row])),
                "label": str(part.labels[row]),
                "prediction": str(part.predictions[row]),
            }
            pixels = to_pixels(item.image, framing)
            with replacing(folder / f"{number:02d}-{rank[item.id]:02d}.safetensors") as temporary:
                temporary.write_bytes(save({"image": pixels.contiguous()}, metadata=about))
            if len(rank) == sum(1 for _ in folder.glob(f"{number:02d}-*.safetensors")):
                break

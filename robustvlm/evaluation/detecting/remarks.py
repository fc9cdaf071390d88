"""What the reader of a detect run has to know of its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from robustvlm.evaluation.detecting.attacking import KNOWN
from robustvlm.evaluation.detecting.encoding import Encoded
from robustvlm.evaluation.detecting.scoring import Panel, copies_of
from robustvlm.runs.summary import Check

# Below this, percentile intervals of rates at the ends of the scale are known to be too short.
_FEW = 50


def remarks(encoded: Mapping[str, Encoded], fit: Encoded | None, panel: Panel) -> Iterator[Check]:
    """Yield findings: images that were learnt from, classes without images, sets too small for their intervals."""
    for name, found in encoded.items():
        copies = copies_of(found, fit)
        if copies:
            message = (
                f"{copies:,} of {len(found.ids):,} images of the set '{name}' look to the model like images of "
                "--fit: scores that learn from images know them by heart."
            )
            yield Check(name=f"copies in {name}", level="warning", message=message)
        if len(found.ids) < _FEW:
            message = f"The set '{name}' has {len(found.ids)} images: bootstrap intervals are too short on so few."
            yield Check(name=f"size of {name}", level="note", message=message)
    if fit is not None:
        seen, classes = len(fit.labels.unique()), len(panel.head.class_embeddings)
        if seen < classes:
            message = (
                f"The images to learn from show {seen} of {classes} classes: scores that learn from images take known "
                "images of the other classes for unknown ones."
            )
            yield Check(name="classes without images", level="warning", message=message)
    if len(encoded[KNOWN].labels.unique()) < 2:
        yield Check(
            name="one class", level="note", message="All known images are of one class: results are about that class."
        )

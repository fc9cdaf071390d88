"""What the manifest of a run says of its data, and what a reader has to know of it beside."""

from __future__ import annotations

from typing import Any

from robustvlm.data import DataSource
from robustvlm.models import VLM
from robustvlm.models.zero_shot import cut_prompts


def describe_data(source: DataSource) -> dict[str, Any]:
    """Return the facts that identify the images and their classes."""
    ids = source.ids()
    return {
        "spec": source.spec,
        "fingerprint": source.fingerprint(),
        "images": None if ids is None else len(ids),
        "class_names": list(source.class_names),
        "templates": list(source.templates),
    }


def remarks_of(source: DataSource, vlm: VLM | None = None) -> list[str]:
    """Return what was left aside or understood in some way in the data, and which prompts `vlm` does not read whole.

    They are said on the terminal and in the manifest, and are no part of what defines a run.

    Example:
        >>> from robustvlm.data import open_data
        >>> remarks_of(open_data("emoji"))
        []
    """
    cut = None if vlm is None else cut_prompts(vlm, source.class_names, source.templates)
    return [*source.remarks, *([cut] if cut else [])]

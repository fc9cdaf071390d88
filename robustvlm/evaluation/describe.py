"""What the manifest of a run says of its data."""

from __future__ import annotations

from typing import Any

from robustvlm.data import DataSource


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

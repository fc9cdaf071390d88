"""Sources whose classes do not matter."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robustvlm.data import open_data
from robustvlm.data.source import Sample
from robustvlm.data.specs import open_unlabelled
from robustvlm.errors import UserError


def test_labels_without_names_are_no_hindrance(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 90, 200)).save(buffer, format="PNG")
    table = pa.table({"image": [{"bytes": buffer.getvalue()}] * 3, "label": [7, 0, 3]})
    pq.write_table(table, tmp_path / "images.parquet")
    spec = f"parquet:{tmp_path}/images.parquet"
    with pytest.raises(UserError, match="class names"):
        open_data(spec)
    found = list(open_unlabelled(spec).samples())
    assert [item.label for item in found if isinstance(item, Sample)] == [-1] * 3
    assert len(open_unlabelled(spec).ids() or ()) == 3


def test_images_ids_groups_and_selection_are_those_of_the_source() -> None:
    plain, wrapped = open_data("emoji?split=near"), open_unlabelled("emoji?split=near")
    assert wrapped.ids() == plain.ids()
    assert [item.id for item in wrapped.samples(limit=5)] == [item.id for item in plain.samples(limit=5)]
    name = "emoji/twemoji/1f436/0"
    assert wrapped.group(name) == plain.group(name) == "emoji/twemoji/1f436"
    assert wrapped.fingerprint() != open_unlabelled("emoji?split=far").fingerprint()


def test_mistakes_are_still_mistakes() -> None:
    with pytest.raises(UserError, match="unknown data kind"):
        open_unlabelled("emojis")
    with pytest.raises(UserError, match="no option"):
        open_unlabelled("imagefolder:x?copies=1")

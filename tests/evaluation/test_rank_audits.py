"""Audits of certified ranks at default effort: radii 15 % and 30 % too large are found, true ones stand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from analytic_encoders import PIXELS, SIDE, HalfSpace
from PIL import Image

from robustvlm.commands.certify import certify
from robustvlm.commands.certify.audit import audit_folder
from robustvlm.commands.certify.audit_search import Effort
from robustvlm.models.custom import CustomVLM
from robustvlm.runs.manifest import write_checksums

AT, EDGE = 0.2, 1.2


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One image on either side of the edge of a half-space, as far from it: the encoder that attains the bounds."""
    monkeypatch.setattr(
        "robustvlm.defenses.pipeline.load_model",
        lambda *_, **__: CustomVLM(HalfSpace(EDGE, slope=2.0), spec="half-space"),
    )
    for name, z in (("0", AT), ("180", 2 * EDGE - AT)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        grey = round(255 * z / np.sqrt(PIXELS))
        Image.new("RGB", (SIDE, SIDE), (grey, grey, grey)).save(folder / f"{name}.png")
    (tmp_path / "templates.txt").write_text("{}\n")
    return tmp_path / "pictures"


def plant(folder: Path, factor: float) -> None:
    table = pq.read_table(folder / "results.parquet")
    place = table.schema.get_field_index("radius")
    table = table.set_column(place, "radius", pa.array(table.column("radius").to_numpy() * factor))
    pq.write_table(table, folder / "results.parquet")
    write_checksums(folder, json.loads((folder / "manifest.json").read_text()))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("claim", ["topk", "recall", "class"])
def test_radii_that_are_a_little_too_large_are_found(pictures: Path, claim: str, early: bool) -> None:
    folder = certify(
        "half-space", data=f"imagefolder:{pictures}", templates=pictures.parent / "templates.txt", claim=claim,
        **({} if claim == "class" else {"top": 1}),
        sigma=0.5, samples=40_000 if early else 10_000, radius=0.95 * (EDGE - AT) if early else None,
        out=pictures.parent, name=claim,
    ).folder  # fmt: skip
    sound = audit_folder(folder, Effort())
    assert sound.certified == 2
    assert not sound.broken
    plant(folder, 1.15)
    assert audit_folder(folder, Effort()).broken
    plant(folder, 1.3 / 1.15)
    assert audit_folder(folder, Effort()).broken

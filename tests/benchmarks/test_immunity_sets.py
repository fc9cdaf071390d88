"""Features that the benchmarks of immunity keep are those of the model and the images asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.immunity.sets import encoded, place_of
from robustvlm.data import open_data
from robustvlm.models import load_model


def test_features_are_kept_by_model_images_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load_model("tiny"), load_model("tiny-robust")
    few, other = open_data("emoji?split=near&copies=1"), open_data("emoji?split=far&copies=1")
    own = encoded(first, few, tmp_path, "few", limit=4)
    assert len(own.ids) == 4
    assert not torch.equal(own.features, encoded(second, few, tmp_path, "few", limit=4).features)
    assert encoded(first, other, tmp_path, "few", limit=4).ids != own.ids
    assert len(encoded(first, few, tmp_path, "few", limit=5).ids) == 5
    # What is there is not encoded again.
    monkeypatch.setattr("benchmarks.immunity.sets.encode_source", None)
    assert torch.equal(encoded(first, few, tmp_path, "few", limit=4).features, own.features)
    assert place_of(tmp_path, "few", first, few, 4).exists()

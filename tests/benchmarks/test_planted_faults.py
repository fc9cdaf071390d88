"""Every planted fault is noticed by its check in a whole attack run, and sound models raise no alarm."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the installed package

from benchmarks import planted_faults
from benchmarks.planted.data import write_folder
from benchmarks.planted_faults import PLANTS, SOUND, Plant
from robustvlm.errors import UserError

QUICK = [plant for plant in PLANTS if plant.model != "tiny"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("planted") / "photos")


@pytest.mark.parametrize("plant", QUICK, ids=[f"{plant.model}-{plant.check}-{plant.level}" for plant in QUICK])
def test_a_planted_fault_is_noticed(plant: Plant, photos: Path) -> None:
    hit, alarms = planted_faults.notice(plant, photos)
    assert hit, [(check.name, check.level) for check in alarms]


def test_only_a_refusal_of_coupled_images_notices_them(photos: Path) -> None:
    plant = next(plant for plant in PLANTS if plant.level == "refused")
    with pytest.raises(UserError, match="unknown attack"):  # refused, but for what is no fault of the model
        planted_faults.notice(replace(plant, settings={"attack": "pgdd"}), photos)
    (refused,) = planted_faults.findings(f"benchmarks.planted.models:{plant.model}", photos)
    assert "a logit moved by" in refused.message


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model", [spec for spec in SOUND if spec != "tiny"])
def test_a_sound_model_raises_no_alarm(model: str, seed: int, photos: Path) -> None:
    made = planted_faults.findings(model, photos, seed=seed)
    assert [check for check in made if check.level in ("warning", "fault")] == []
    asked = {check.name for check in made}
    assert {"useful gradients", "logits", "gradient against noise", "gradient as stated", "input range"} <= asked
    assert {"larger radius", "more steps", "search at random", "huge radius", "extra attacks"} <= asked

"""The bundled robust model: its files, its text tower, and what it withstands."""

from __future__ import annotations

import json
import stat

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from robustvlm.attacks import ThreatModel
from robustvlm.commands.attack.checks import published
from robustvlm.data import open_data
from robustvlm.data.emoji import ASSETS
from robustvlm.models import load_model, zero_shot
from robustvlm.training import LabelledImages, RobustValidation

FOLDER, TINY = ASSETS / "tiny-robust", ASSETS / "tiny"
WEIGHTS = "open_clip_model.safetensors"


def test_weights_are_half_precision_readable_finite_and_no_larger_than_tiny_s() -> None:
    path = FOLDER / WEIGHTS
    assert path.stat().st_size <= (TINY / WEIGHTS).stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dictionary
            tensor = file.get_tensor(name)
            assert tensor.dtype in (torch.float16, torch.int64)
            assert torch.isfinite(tensor.float()).all(), name


def test_the_text_tower_is_tiny_s() -> None:
    robust, tiny = load_file(FOLDER / WEIGHTS), load_file(TINY / WEIGHTS)
    assert robust.keys() == tiny.keys()
    changed = {name for name in tiny if not torch.equal(robust[name], tiny[name])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    assert (FOLDER / "bpe_4096.txt.gz").read_bytes() == (TINY / "bpe_4096.txt.gz").read_bytes()


def test_stock_open_clip_and_load_model_agree() -> None:
    model, vlm = open_clip.create_model(f"local-dir:{FOLDER}").eval(), load_model("tiny-robust")
    pixels = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(vlm.encode_image(pixels), model.encode_image(pixels, normalize=True))


def test_it_withstands_what_tiny_does_not() -> None:
    """PGD of ten steps on an unseen style; `robustvlm attack` with the whole ensemble gives the figures of the docs."""
    source = open_data("emoji?split=test&copies=1")
    images = LabelledImages.read(source, size=64, limit=40)
    validation = RobustValidation(images, ThreatModel("Linf", 2 / 255), n_iter=10)
    found = {}
    for spec in ("tiny", "tiny-robust"):
        classifier = zero_shot(load_model(spec), source.class_names, source.templates, cache=False)
        found[spec] = validation.measure(classifier)
    clean, robust = ({spec: m[f"{what} accuracy"].value for spec, m in found.items()} for what in ("clean", "robust"))
    assert clean["tiny-robust"] >= clean["tiny"] - 0.15
    assert robust["tiny-robust"] >= robust["tiny"] + 0.25


def test_training_record_names_command_and_figures() -> None:
    record = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m tools.train_tiny_robust")
    assert not {"twemoji", "streamline-emojis"} & set(record["train_styles"])
    assert f"--seed {record['options']['seed']}" in record["command"]
    assert all(one.startswith("python -m tools.train_tiny_robust") for one in record["before"])
    assert bool(record["before"]) == (record["started_from"] == "tiny-robust")
    assert 0 < record["validation"]["robust accuracy"] < record["validation"]["clean accuracy"]


@pytest.mark.parametrize(("spec", "undefended"), [("tiny", True), ("tiny-robust", False)])
def test_it_is_not_taken_for_undefended(spec: str, undefended: bool) -> None:
    assert published(spec) is undefended

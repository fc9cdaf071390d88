"""The recipe of the bundled robust model: what it reads, and what its loss is of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tools` is no part of the installed package

from robustvlm.attacks import ThreatModel
from robustvlm.data.emoji import TRAIN_STYLES
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.models import load_model
from robustvlm.training import Draws, RobustValidation
from tools.tiny.robust import RobustTiny, SpriteData, Weights, validation_images
from tools.tiny.sprites import Taxonomy


@pytest.fixture(scope="module")
def data() -> SpriteData:
    return SpriteData(Taxonomy.load(), seed=0)


def test_an_epoch_shows_every_class_once_however_it_is_cut(data: SpriteData) -> None:
    (whole,) = data.batches([range(173, 346)])
    assert whole.labels.tolist() == list(range(173))
    parts = list(data.batches([range(173, 200), range(200, 346)]))
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert [name for part in parts for name in part.ids] == list(whole.ids)
    assert set(data.batches_of.sprites.styles) == set(TRAIN_STYLES)


def test_validation_reads_the_validation_style_alone() -> None:
    assert {name.split("/")[1] for name in validation_images(copies=1).ids} == {"streamline-emojis"}


def test_the_loss_is_that_of_attacked_images_in_the_net_s_own_statistics(data: SpriteData) -> None:
    vlm = load_model("tiny")
    vlm.model.visual.requires_grad_(True)
    threat = ThreatModel("Linf", 2 / 255)
    task = RobustTiny(
        vlm,
        Taxonomy.load(),
        attack=InnerAttack(threat=threat, steps=1),
        weights=Weights(clean=0.5, hierarchy=0.0),
        validation=RobustValidation(validation_images(copies=1), threat),
    )
    batch = next(iter(data.batches([range(24)])))
    before = {name: value.clone() for name, value in vlm.named_buffers()}
    vlm.eval()  # only `train_mode` makes statistics move
    terms = task.losses(batch.pixels, batch.labels, 0, Draws(0, 0, batch.ids))
    assert float(terms["adversarial"].detach()) > float(terms["clean"].detach())
    assert terms["loss"].item() == pytest.approx((terms["adversarial"] + 0.5 * terms["clean"]).item())
    assert all(torch.equal(value, before[name]) for name, value in vlm.named_buffers())
    task.train_mode()
    task.losses(batch.pixels, batch.labels, 0, Draws(0, 0, batch.ids))
    assert not all(torch.equal(value, before[name]) for name, value in vlm.named_buffers())

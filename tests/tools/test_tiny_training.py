"""The recipe of the bundled model: what a batch holds, what augmentation may do, how a killed training goes on."""

import argparse
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tools` is no part of the installed package

from robustvlm.core.seeds import generator
from robustvlm.data.emoji import TRAIN_STYLES
from tools.tiny.augment import augment, erase, outline, recolour
from tools.tiny.captions import caption, node_caption, with_article
from tools.tiny.measures import auroc
from tools.tiny.sprites import Batch, Batches, Sprites, Taxonomy
from tools.train_tiny import Trainer


@pytest.fixture(scope="module")
def batches():
    taxonomy = Taxonomy.load()
    return Batches(Sprites.load(taxonomy), taxonomy, seed=0)


def test_only_training_styles_are_loaded(batches):
    assert set(batches.sprites.styles) == set(TRAIN_STYLES)


def test_a_batch_shows_every_class_once_and_names_it(batches):
    batch = batches.at(5)
    assert batch.labels.tolist() == list(range(173))
    assert batch.pixels.shape == (173, 3, 64, 64)
    for text, name in zip(batch.captions, batches.taxonomy.names, strict=True):
        assert name in text
    assert len(batch.nodes) == 26 + 6


def test_a_batch_depends_on_seed_and_step_alone(batches):
    first, again, later = batches.at(3), batches.at(3), batches.at(4)
    assert torch.equal(first.pixels, again.pixels)
    assert first.captions == again.captions
    assert not torch.equal(first.pixels, later.pixels)
    other = Batches(batches.sprites, batches.taxonomy, seed=1).at(3)
    assert not torch.equal(first.pixels, other.pixels)


def test_augmented_pictures_stay_in_range():
    stream = generator("augment")
    pixels, colour = augment(torch.rand(16, 4, 64, 64, generator=stream), stream)
    assert pixels.shape == (16, 3, 64, 64)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert colour.max() < 12


def test_hue_and_saturation_leave_grey_grey():
    grey = torch.linspace(0.2, 0.8, 64).expand(8, 3, 4, 64)
    changed = recolour(grey, generator("grey"))
    torch.testing.assert_close(changed[:, 0], changed[:, 1], atol=5e-3, rtol=0)
    torch.testing.assert_close(changed[:, 1], changed[:, 2], atol=5e-3, rtol=0)


def test_erasing_and_outlining_change_only_some():
    alpha = torch.ones(400, 1, 32, 32)
    holes = erase(alpha, generator("holes")).flatten(1).amin(1) == 0
    assert 0.2 < holes.float().mean() < 0.4
    disc = ((torch.arange(32) - 16) ** 2 + (torch.arange(32)[:, None] - 16) ** 2 < 100).float().expand(400, 1, 32, 32)
    colour, grown = outline(torch.ones(400, 3, 32, 32), disc.clone(), generator("lines"))
    lined = (grown > disc).flatten(1).any(1)
    assert 0.1 < lined.float().mean() < 0.27
    assert torch.equal(colour[~lined], torch.ones_like(colour[~lined]))


def test_captions_name_class_and_kind():
    texts = [
        caption(
            name="owl",
            superclass="bird",
            domain="animal",
            background="blue",
            style="noto",
            tags=("wise",),
            rng=random.Random(seed),
        )
        for seed in range(200)
    ]
    assert all("owl" in text for text in texts)
    for part in ("an owl", "a bird", "a kind of animal", "on a blue background", "noto style: ", "wise"):
        assert any(part in text for text in texts), part
    assert with_article("owl") == "an owl"
    assert "bird" in node_caption("bird", random.Random(0))


def test_auroc_counts_pairs():
    stream = generator("auroc")
    inside = torch.randint(0, 9, (50,), generator=stream).float() + 2
    outside = torch.randint(0, 9, (70,), generator=stream).float()
    pairs = [(a > b) + 0.5 * (a == b) for a in inside.tolist() for b in outside.tolist()]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, batches):
    def few(step):
        batch = batches.at(step)
        return Batch(batch.pixels[:12], batch.captions[:12], batch.nodes, batch.labels[:12])

    def trainer():
        options = argparse.Namespace(
            steps=4, seed=0, lr=1e-3, weight_decay=0.1, ema=0.9, hierarchy=0.6, init=None, state=tmp_path / "state.pt"
        )
        made = Trainer(options)
        made.batches = argparse.Namespace(at=few)
        return made

    through = trainer()
    through.advance()
    through.save_state()
    through.advance()
    resumed = trainer()
    resumed.load_state()
    assert resumed.step == 1
    resumed.advance()
    for key, value in through.average.state_dict().items():
        torch.testing.assert_close(resumed.average.state_dict()[key], value, atol=1e-6, rtol=1e-4)

"""Common corruptions: what names mean, ranges, draws, what each must and must not do to an image."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from robustvlm.data import corrupting, open_data
from robustvlm.data.corruptions import (
    _LEVELS,
    GROUPS,
    NAMES,
    SEVERITIES,
    SIDES,
    Corruption,
    corrupted,
    parse_corruptions,
    table_side,
    weights_of,
    written,
)
from robustvlm.errors import UserError

# By the constants these are no scale of distance: `elastic-transform` stretches the whole or parts, `glass-blur`
# blurs more and moves less, and ice is brighter than some images and darker than others.
UNEVEN = {"elastic-transform", "glass-blur", "frost"}


def test_there_are_fifteen_with_five_severities_at_every_side() -> None:
    assert len(NAMES) == len(set(NAMES)) == 15
    assert set(corrupting.KINDS) == set(NAMES)
    for side in SIDES:
        assert {name: len(levels) for name, levels in _LEVELS[side].items()} == dict.fromkeys(NAMES, 5)
    assert [len(names) for names in GROUPS.values()] == [3, 4, 4, 4]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 64), (32, 40), (130, 120)])
def test_pixels_stay_pixels_and_draws_are_the_images_own(name: str, shape: tuple[int, int]) -> None:
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    before = image.clone()
    least, most = Corruption(name, 1)(image, "a"), Corruption(name, 5)(image, "a")
    for found in (least, most):
        assert found.shape == image.shape
        assert found.dtype == torch.float32
        assert 0 <= found.min() <= found.max() <= 1
        assert torch.allclose(255 * found, (255 * found).round(), atol=1e-4)
        assert (found - image).abs().mean() > 0.003
    torch.rand(3), np.random.default_rng().random()
    assert torch.equal(Corruption(name, 5)(image, "a"), most)
    drawn = name not in ("defocus-blur", "zoom-blur", "brightness", "contrast", "pixelate", "jpeg-compression")
    assert torch.equal(Corruption(name, 5)(image, "b"), most) != drawn
    assert torch.equal(image, before)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 300)])
@pytest.mark.parametrize("name", NAMES)
def test_images_of_few_pixels_have_pixels_afterwards(name: str, shape: tuple[int, int]) -> None:
    for severity in (1, 5):
        found = Corruption(name, severity)(torch.full((3, *shape), 0.5), "a")
        assert found.shape == (3, *shape)
        assert 0 <= found.min() <= found.max() <= 1, "and no NaN"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNEVEN])
@pytest.mark.parametrize("side", [32, 64])
def test_more_severe_is_farther_from_clean(name: str, side: int) -> None:
    pixels, _, ids = open_data("emoji?copies=1").tensors(side, limit=8)
    gaps = [
        float((corrupted(pixels, ids, Corruption(name, severity)) - pixels).square().mean()) for severity in SEVERITIES
    ]
    assert all(more >= 0.999 * less for less, more in pairwise(gaps)), gaps
    assert gaps[4] > 1.3 * gaps[0]


def test_constants_grow_or_fall() -> None:
    for side in SIDES:
        for name, levels in _LEVELS[side].items():
            if len(levels[0]) == 1:
                numbers = [level[0] for level in levels]
                assert numbers in (sorted(numbers), sorted(numbers, reverse=True)), (side, name)
        ice = [ice / kept for kept, ice in _LEVELS[side]["frost"]]
        assert ice == sorted(ice)


def test_glass_moves_values_and_makes_none() -> None:
    image = np.random.default_rng(0).random((20, 24, 3))
    moved = corrupting.glass_blur(image, (0, 2, 3), 1.0, np.random.default_rng(1))
    assert not np.array_equal(moved, image)
    assert np.array_equal(np.sort(moved.reshape(-1, 3), axis=0), np.sort(image.reshape(-1, 3), axis=0))


def test_closed_forms() -> None:
    random = np.random.default_rng(0)
    image = random.random((48, 48, 3))
    level, kinds = (0.3,), corrupting
    darker = kinds.contrast(image, level, 1.0, random)
    assert np.allclose(darker.std(axis=(0, 1)), 0.3 * image.std(axis=(0, 1)))
    assert np.allclose(darker.mean(axis=(0, 1)), image.mean(axis=(0, 1)))
    brighter = kinds.brightness(image, (0.2,), 1.0, random)
    assert np.allclose(brighter.max(axis=2), np.minimum(image.max(axis=2) + 0.2, 1))
    assert np.allclose(
        brighter * image[..., :1], image * brighter[..., :1]
    )  # ratios of channels, so hue and saturation
    assert np.allclose(kinds.brightness(np.zeros((2, 2, 3)), (0.2,), 1.0, random), 0.2)
    even = np.full((40, 40, 3), 0.4)
    for kind, numbers in (("defocus-blur", (5, 0.5)), ("motion-blur", (10, 4)), ("zoom-blur", (1.2, 0.02)),
                          ("glass-blur", (1, 2, 1)), ("elastic-transform", (0.1, 0.05, 0.05)), ("pixelate", (0.5,)),
                          ("contrast", (0.1,))):  # fmt: skip
        # What only moves or averages pixels leaves an even image as it is.
        assert np.allclose(kinds.KINDS[kind](even, numbers, 1.0, random), 0.4), kind
    noisy = kinds.impulse_noise(np.full((200, 200, 3), 0.5), (0.2,), 1.0, random)
    assert [(noisy == value).mean() for value in (0.0, 1.0, 0.5)] == pytest.approx([0.1, 0.1, 0.8], abs=0.005)
    counted = kinds.shot_noise(np.full((200, 200, 3), 0.5), (60,), 1.0, random)
    assert (counted.mean(), counted.var()) == pytest.approx((0.5, 0.5 / 60), rel=0.03)
    added = kinds.gaussian_noise(np.zeros((200, 200, 3)), (0.1,), 1.0, random)
    assert added.std() == pytest.approx(0.1, rel=0.01)


def test_a_disc_blurs_as_a_sum_over_it_does() -> None:
    image = np.random.default_rng(2).random((30, 26, 3))
    found = corrupting.defocus_blur(image, (3, 0.0), 1.0, np.random.default_rng(0))
    across = np.arange(-3, 4)
    inside = [(down, right) for down in across for right in across if down**2 + right**2 <= 9]
    by_hand = np.mean([image[15 + down, 12 + right] for down, right in inside], axis=0)
    assert np.allclose(found[15, 12], by_hand)


def test_blocks_and_jpeg_are_pillows_own() -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    image = np.asarray(picture) / 255
    small = picture.resize((32, 32), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BOX)
    found = corrupting.pixelate(image, (0.5,), 1.0, np.random.default_rng(0))
    assert np.array_equal(np.rint(255 * found), np.asarray(small))


def test_lengths_grow_with_the_image() -> None:
    assert [table_side(side) for side in (28, 45, 46, 119, 120, 518)] == [32, 32, 64, 64, 224, 224]
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
    small, large = (torch.nn.functional.interpolate(image[None], side)[0] for side in (224, 448))
    blurred = Corruption("defocus-blur", 5)(large, "a")
    same = torch.nn.functional.avg_pool2d(blurred[None], 2)[0]
    assert (same - Corruption("defocus-blur", 5)(small, "a")).abs().mean() < 0.005


def test_what_names_mean() -> None:
    assert [len(parse_corruptions(text)) for text in ("all", "all:3", "fog", "fog:2", "fog,fog:2,all:1")] == [
        75, 15, 5, 1, 19,
    ]  # fmt: skip
    assert written(parse_corruptions(" Gaussian_Noise:4 , fog:1")) == "gaussian-noise:4,fog:1"
    for text in ("all", "fog:1,snow", "pixelate:2"):
        assert sum(weights_of(parse_corruptions(text))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fogg:2", "corrupt must be all or kinds of corruption.*'fogg:2': did you mean 'fog'"),
        ("fog:6", "severity from 1 to 5 .*got 'fog:6'"),
        ("fog:", "severity from 1 to 5"),
        ("", "corrupt must be all or kinds"),
        ("fog,,snow", "corrupt must be all or kinds"),
    ],
)
def test_what_is_not_meant_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        parse_corruptions(text)
    assert "\n" not in str(error.value)

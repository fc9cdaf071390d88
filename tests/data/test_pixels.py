"""Pixels agree with the preprocessing CLIP models are used with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from robustvlm.core.framing import to_pixels
from robustvlm.errors import UserError


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 48), st.sampled_from(["bicubic", "bilinear", "nearest"]))
def test_range_shape_and_the_torchvision_pipeline(width: int, height: int, size: int, interpolation: str) -> None:
    image = picture(width, height)
    got = to_pixels(image, size, interpolation=interpolation)
    assert got.shape == (3, size, size)
    assert got.dtype == torch.float32
    assert got.min() >= 0
    assert got.max() <= 1
    if max(width, height) <= 32 * min(width, height):
        mode = transforms.InterpolationMode(interpolation)
        pipeline = transforms.Compose(
            [transforms.Resize(size, mode), transforms.CenterCrop(size), transforms.ToTensor()]
        )
        assert torch.equal(got, pipeline(image))


def test_the_open_clip_pipeline() -> None:
    from open_clip.transform import image_transform

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    reference = image_transform(32, is_train=False, mean=mean, std=std)(picture(75, 50))
    ours = to_pixels(picture(75, 50), 32)
    normalised = (ours - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(normalised, reference, atol=1e-6)


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(20, 20)
    assert torch.equal((to_pixels(image, 20) * 255).round().permute(1, 2, 0), torch.from_numpy(np.array(image)).float())


def test_a_strip_does_not_explode() -> None:
    assert to_pixels(Image.new("RGB", (1, 60_000), (0, 255, 0)), 64)[1].min() == 1


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="unknown interpolation 'bicubik': did you mean 'bicubic'"):
        to_pixels(picture(4, 4), 4, interpolation="bicubik")
    with pytest.raises(UserError, match="at least 1 pixel, got 0"):
        to_pixels(picture(4, 4), 0)

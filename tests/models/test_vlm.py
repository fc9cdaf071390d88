"""Invariants of every model: range and gradient of pixels, unit features, independence of batch mates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustvlm.core.framing import to_pixels
from robustvlm.errors import UserError
from robustvlm.models import VLM, load_model, resize

QUICK = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def vlm(save_clip: Callable[..., Path]) -> VLM:
    return load_model(str(save_clip()))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with edges and gradients: noise alone would hide an offset by a pixel."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(down / (2 + c) + across / (3 + 2 * c)) for c in range(3)]
    array = np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    array[height // 3 : height // 2, width // 4 :] = rng.integers(0, 256, 3)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("side", [16, 24, 9])
def test_features_have_unit_norm_and_pixels_get_gradients(vlm: VLM, side: int) -> None:
    pixels = torch.rand(3, 3, side, side).requires_grad_()
    features = vlm.encode_image(pixels)
    assert features.shape == (3, 24)
    assert torch.allclose(features.norm(dim=-1), torch.ones(3), atol=1e-6)
    (gradient,) = torch.autograd.grad(features[:, 0].sum(), pixels)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_gradient_matches_finite_differences(vlm: VLM) -> None:
    double = vlm.double()
    pixels = torch.rand(1, 3, 16, 16, dtype=torch.float64).mul(0.8).add(0.1).requires_grad_()
    direction = torch.randn(1, 3, 16, 16, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        return double._image_features(x)[0, 3]

    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    with torch.no_grad():
        slope = (value(pixels + 1e-6 * direction) - value(pixels - 1e-6 * direction)) / 2e-6
    assert torch.allclose((gradient * direction).sum(), slope, rtol=1e-5)


def test_one_image_does_not_depend_on_its_batch_mates(vlm: VLM) -> None:
    images = torch.rand(6, 3, 16, 16)
    together = vlm.encode_image(images)
    others = images.clone()
    others[1:] = 1 - others[1:]
    assert torch.equal(vlm.encode_image(others)[0], together[0])
    alone = torch.cat([vlm.encode_image(image[None]) for image in images])
    assert torch.allclose(alone, together, atol=1e-6)


def test_model_is_frozen_and_evaluating(vlm: VLM) -> None:
    assert not any(p.requires_grad for p in vlm.parameters())
    assert not any(module.training for module in vlm.modules())
    assert all(p.dtype == torch.float32 for p in vlm.parameters())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (40, 40), (37, 61), (10, 12)])
def test_preprocessing_equals_open_clips_own(
    save_clip: Callable[..., Path], interpolation: str, size: tuple[int, int]
) -> None:
    folder = save_clip(interpolation=interpolation)
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    vlm = load_model(str(folder))
    image = picture(*size)
    theirs = transform(image)[None]
    ours = to_pixels(image, vlm.image_size, interpolation=vlm.interpolation)[None]
    assert torch.allclose((ours - vlm.mean) / vlm.std, theirs, atol=1e-6)
    expected = model.encode_image(theirs, normalize=True)
    assert torch.allclose(vlm.encode_image(ours), expected, atol=1e-5)
    # The transform must matter for the comparison to mean anything.
    assert not torch.allclose(model.encode_image(ours, normalize=True), expected, atol=1e-2)


def test_texts_equal_open_clips_own(save_clip: Callable[..., Path]) -> None:
    folder = save_clip()
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    texts = ["a photo of a cat", "an unusually long text " * 9, ""]
    expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), normalize=True)
    vlm = load_model(str(folder))
    assert torch.allclose(vlm.encode_text(texts), expected, atol=1e-6)
    assert vlm.logit_scale == pytest.approx(1 / 0.07)


@settings(max_examples=25, deadline=None)
@given(side=st.integers(5, 80), size=st.integers(4, 48), mode=st.sampled_from(["bicubic", "bilinear"]))
def test_resize_inside_equals_pillow(side: int, size: int, mode: str) -> None:
    pixels = to_pixels(picture(side, side, seed=side), side)
    method = Image.Resampling[mode.upper()]
    # As float images, for Pillow rounds and clips 8-bit ones after each of its two passes.
    channels = [Image.fromarray(channel.numpy()).resize((size, size), method) for channel in pixels]
    expected = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels]).clamp(0, 1)
    assert torch.allclose(resize(pixels[None], size, mode)[0], expected, atol=2e-6)


def test_resize_inside_is_near_the_8_bit_way() -> None:
    image = picture(64, 64)
    inside = resize(to_pixels(image, 64)[None], 24)[0]
    assert (inside - to_pixels(image, 24)).abs().mean() < 0.5 / 255


def test_resize_stays_in_range_and_is_a_no_op_at_its_own_size() -> None:
    step = torch.zeros(1, 3, 12, 12)
    step[..., 6:] = 1
    scaled = resize(step, 20)
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert resize(step, 12) is step


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (torch.rand(3, 16, 16), "shape [batch, 3, height, width], got [3, 16, 16]"),
        (torch.rand(1, 1, 16, 16), "got [1, 1, 16, 16]"),
        (torch.rand(1, 3, 16, 20), "square, got 16x20"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "divide 8-bit images by 255"),
    ],
)
def test_wrong_pixels_are_named(vlm: VLM, pixels: torch.Tensor, says: str) -> None:
    with pytest.raises(UserError) as caught:
        vlm.encode_image(pixels)
    assert says in str(caught.value)


@pytest.mark.parametrize("texts", [[], "one text"])
def test_encode_text_needs_a_list(vlm: VLM, texts: object) -> None:
    with pytest.raises(UserError, match="list of at least one text"):
        vlm.encode_text(texts)  # type: ignore[arg-type]


class TestFingerprint:
    def test_same_weights_same_digest(self, save_clip: Callable[..., Path]) -> None:
        folder = save_clip()
        assert load_model(str(folder)).fingerprint == load_model(str(folder)).fingerprint

    def test_any_weight_counts_and_a_step_is_noticed(self, vlm: VLM) -> None:
        before = vlm.fingerprint
        with torch.no_grad():
            weight = vlm.model.visual.conv1.weight
            weight.view(-1)[-1].add_(1e-6)
        assert vlm.fingerprint != before

    def test_preprocessing_counts(self, save_clip: Callable[..., Path]) -> None:
        digests = [load_model(str(save_clip("a"))).fingerprint]
        digests.append(load_model(str(save_clip("b", mean=(0.5, 0.5, 0.5)))).fingerprint)
        digests.append(load_model(str(save_clip("c", interpolation="bilinear"))).fingerprint)
        assert len(set(digests)) == 3

    def test_architecture_counts_where_the_weights_agree(self, save_clip: Callable[..., Path]) -> None:
        plain, other = load_model(str(save_clip("a"))), load_model(str(save_clip("b", model_cfg=QUICK)))
        pixels = torch.rand(2, 3, 16, 16)
        assert torch.equal(plain.model.visual.conv1.weight, other.model.visual.conv1.weight)
        assert not torch.allclose(plain.encode_image(pixels), other.encode_image(pixels), atol=1e-5)
        assert plain.fingerprint != other.fingerprint

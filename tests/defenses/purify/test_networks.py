"""Purifier and mapper as functions: shapes, identities, one image at a time, and what the noise level does to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustvlm.defenses.purify.parts import Mapper, MapperShape
from robustvlm.defenses.purify.unet import SIZES, Purifier, PurifierShape, coefficients, purifier_shape
from robustvlm.errors import UserError


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def trained(part: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights everywhere, as after training: nothing is zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return part.eval()


def small(stride: int = 1) -> Purifier:
    torch.manual_seed(0)
    return trained(Purifier(PurifierShape(widths=(8, 16), stride=stride, embedding=16)))  # type: ignore[return-value]


def a_mapper(dim: int) -> Mapper:
    torch.manual_seed(0)
    return trained(Mapper(MapperShape(dim=dim)))  # type: ignore[return-value]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 21), st.integers(1, 21), st.sampled_from([1, 2, 4]))
def test_any_height_and_width(height: int, width: int, stride: int) -> None:
    pixels = draws(2, 3, height, width)
    estimate = small(stride)(pixels, 0.25)
    assert estimate.shape == pixels.shape
    assert estimate.isfinite().all()


def test_padding_does_not_reach_into_images_that_need_none() -> None:
    purifier, pixels = small(), draws(1, 3, 8, 8)
    assert torch.equal(purifier(pixels, 0.2), purifier(pixels.clone(memory_format=torch.contiguous_format), 0.2))
    assert not torch.equal(purifier(pixels[..., :7], 0.2), purifier(pixels, 0.2)[..., :7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_both_are_the_identity_whatever_their_weights(dtype: torch.dtype) -> None:
    pixels, features = draws(3, 3, 9, 9).to(dtype), draws(3, 12).to(dtype)
    assert torch.equal(small().to(dtype)(pixels, 0.0), pixels)
    mapper = a_mapper(12).to(dtype)
    assert torch.equal(mapper(features, 0.0), features)
    assert not torch.equal(mapper(features, 0.1), features)


def test_untrained_the_purifier_is_the_estimate_for_independent_gaussian_pixels() -> None:
    pixels, sigma = draws(2, 3, 8, 8), 0.5
    shrunk = 0.5 + 0.25**2 / (0.25**2 + sigma**2) * (pixels - 0.5)
    assert torch.allclose(Purifier(PurifierShape(widths=(8, 16)))(pixels, sigma), shrunk, atol=1e-6)
    assert torch.equal(Mapper(MapperShape(dim=4))(draws(5, 4), 0.5), draws(5, 4))


@given(st.floats(0.001, 5))
def test_preconditioning_keeps_input_and_target_at_unit_variance(sigma: float) -> None:
    skip, out, into = (float(c) for c in coefficients(torch.tensor([sigma], dtype=torch.float64)))
    data = 0.25
    assert into**2 * (sigma**2 + data**2) == pytest.approx(1)
    # The network's target is (x - skip (x + e)) / out, with variance ((1 - skip)^2 data^2 + skip^2 sigma^2) / out^2.
    assert ((1 - skip) ** 2 * data**2 + skip**2 * sigma**2) / out**2 == pytest.approx(1)


@pytest.mark.parametrize("half", [False, True])
def test_a_row_depends_on_its_own_image_alone(half: bool) -> None:
    purifier, mapper = small(2), a_mapper(12)
    pixels, features = draws(5, 3, 12, 12), draws(5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
        whole, mapped = purifier(pixels, 0.25), mapper(features, 0.25)
        for row in range(5):
            assert torch.allclose(purifier(pixels[row : row + 1], 0.25)[0], whole[row], atol=2e-2 if half else 1e-5)
            assert torch.allclose(mapper(features[row : row + 1], 0.25)[0], mapped[row], atol=2e-2 if half else 1e-5)
        others = torch.cat([pixels[:1], 100 * pixels[1:]])
        assert torch.allclose(purifier(others, 0.25)[0], whole[0], atol=2e-2 if half else 1e-5)
    assert whole.dtype == mapped.dtype == torch.float32  # sums with pixels and features stay wide


def test_levels_may_differ_between_the_images_of_a_batch() -> None:
    purifier, mapper = small(), a_mapper(6)
    pixels, features, sigma = draws(3, 3, 8, 8), draws(3, 6), torch.tensor([0.0, 0.12, 0.5])
    for part, x in ((purifier, pixels), (mapper, features)):
        together = part(x, sigma)
        alone = torch.cat([part(x[i : i + 1], float(sigma[i])) for i in range(3)])
        assert torch.allclose(together, alone, atol=1e-5)
        assert not torch.allclose(part(x, 0.12), part(x, 0.5), atol=1e-2)


def test_wider_arithmetic_gives_the_same_answer() -> None:
    purifier, pixels = small(), draws(2, 3, 8, 8)
    wide = small().double()(pixels.double(), 0.25)
    assert torch.allclose(purifier(pixels, 0.25).double(), wide, atol=1e-5)


def test_the_presets_stay_small_and_know_their_stride() -> None:
    tiny = Purifier(purifier_shape("tiny", 64))
    assert 2e5 < sum(p.numel() for p in tiny.parameters()) < 6e5
    assert [purifier_shape("base", side).stride for side in (16, 32, 63, 64, 127, 128, 224, 336)] == [
        1,
        1,
        1,
        2,
        2,
        4,
        4,
        4,
    ]
    assert all(shape.multiple <= 64 for shape in SIZES.values())
    with pytest.raises(UserError, match="unknown purifier size 'tinny': did you mean 'tiny'"):
        purifier_shape("tinny", 64)


def test_a_few_steps_learn_to_denoise() -> None:
    torch.manual_seed(0)
    purifier = Purifier(PurifierShape(widths=(8, 16), embedding=16)).train()
    optimizer = torch.optim.Adam(purifier.parameters(), lr=1e-2)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        flat = draws(16, 3, 1, 1, seed=seed).expand(-1, -1, 8, 8)  # images of one colour
        return flat, flat + 0.25 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed))

    def error(seed: int) -> Tensor:
        clean, noisy = batch(seed)
        return (purifier(noisy, 0.25) - clean).square().mean()

    before = error(1000).item()
    for step in range(60):
        optimizer.zero_grad()
        error(step).backward()
        optimizer.step()
    assert error(1000).item() < 0.35 * before

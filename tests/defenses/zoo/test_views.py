"""Random views by sampling: against torchvision's, in closed cases, and a pass at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from robustvlm.defenses import load_classifier
from robustvlm.defenses.zoo import views


def _smooth_image(side: int = 32) -> Tensor:
    axis = torch.linspace(0, 1, side)
    down, across = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([across, down, 0.5 + 0.4 * torch.sin(5 * across + 3 * down)])[None]


def _draw(area: float, shape: float, mirror: float, across: float, down: float) -> Tensor:
    return torch.tensor([[area, shape, mirror, across, down]])


def test_a_crop_is_the_one_of_torchvision() -> None:
    x = _smooth_image()
    # A quarter of the area, square, its corner at (8, 4) of 32: 16 pixels wide.
    found = views.crops(x, _draw(0.25, 0.5, 0.9, 8 / 16, 4 / 16), least=0.0)
    wanted = tv.resized_crop(x, 4, 8, 16, 16, [32, 32], InterpolationMode.BILINEAR, antialias=False)
    inside = (..., slice(4, -4), slice(4, -4))  # at its border torchvision does not see what lies beyond
    torch.testing.assert_close(found[inside], wanted[inside], atol=2e-3, rtol=0)
    mirrored = views.crops(x, _draw(0.25, 0.5, 0.1, 8 / 16, 4 / 16), least=0.0)
    torch.testing.assert_close(mirrored, found.flip(-1))


@pytest.mark.parametrize(("shape", "ratio"), [(0.0, 0.75), (1.0, 4 / 3)])
def test_the_shape_of_a_crop(shape: float, ratio: float) -> None:
    # The first channels of the image are its coordinates, so their spread is the crop's width and height.
    x = _smooth_image(64)
    found = views.crops(x, _draw(0.3, shape, 0.9, 0.5, 0.5), least=0.0)[0]
    width, height = ((found[place].amax() - found[place].amin()).item() for place in (0, 1))
    assert width / height == pytest.approx(ratio, rel=0.02)
    assert width * height == pytest.approx(0.3, rel=0.05)


def test_a_perspective_is_the_one_of_torchvision() -> None:
    x = _smooth_image()
    draws = torch.tensor([[0.2, 0.6, 0.9, 0.1, 0.4, 0.5, 0.0, 0.8]])
    found = views.perspectives(x, draws)
    # There corners are the middles of the outermost pixels; a pixel's middle is at (place + 1/2) / side of ours.
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    start, end = ((c * 16 + 15.5).tolist() for c in (corners, corners * (1 - 0.5 * draws.view(4, 2))))
    wanted = tv.perspective(x, start, end, InterpolationMode.BILINEAR, fill=[0.0, 0.0, 0.0])
    inside = F.avg_pool2d((wanted > 0.02).float().amin(1, keepdim=True), 5, 1, 2) == 1  # away from the black
    assert inside.float().mean() > 0.2
    assert (found - wanted).abs().amax(1, keepdim=True)[inside].max() < 0.03
    assert found[0, :, 0, 31].abs().max() == 0  # that corner has moved far in


def test_a_homography_brings_the_corners_where_they_should_be() -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).double().expand(3, 4, 2)
    target = source + 0.3 * torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    found = torch.einsum("bij,bpj->bpi", views.homography(source, target), F.pad(source, (0, 1), value=1.0))
    torch.testing.assert_close(found[..., :2] / found[..., 2:], target)


def test_views_in_passes_are_views_at_once_with_the_same_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 8, 8, generator=generator).requires_grad_()
    assert (
        len({view(x).sum().item() for view in views.drawn(views.crops, torch.rand(2, 6, 5, generator=generator))}) == 6
    )
    draws = torch.rand(2, 7, views.CROP_DRAWS, generator=generator)
    encode = lambda v: v.flatten(1).square()  # noqa: E731
    found = []
    for rows in (4, 1000):
        features = views.features_of(encode, views.drawn(views.crops, draws), x, rows_per_pass=rows)
        found.append((features, torch.autograd.grad(features.sin().sum(), x)[0]))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0][0][:, 3], encode(views.crops(x, draws[:, 3])))


@pytest.mark.parametrize("spec", ["tiny+vote:2", "tiny+tte:3", "tiny+csr", "tiny+rtpt:views=2"])
def test_an_encoder_gets_pixels_channels_last_where_the_images_are(spec: str) -> None:
    model = load_classifier(spec, ["apple", "dog"], ["{}"], cache=False)
    first = next(part for part in model.modules() if isinstance(part, torch.nn.Conv2d))
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last))
    handle.remove()
    assert seen
    assert all(pixels.stride(1) == 1 for pixels in seen)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("off", ["vote:0", "tte:1", "bits:8", "csr:eps=0"])
def test_what_does_nothing_is_the_undefended_convolutional_model_to_the_bit(off: str, last: bool) -> None:
    plain, defended = (load_classifier(spec, ["apple", "dog"], ["{}"], cache=False) for spec in ("tiny", f"tiny+{off}"))
    images = torch.randint(0, 256, (3, 3, 64, 64)) / 255
    images = images.to(memory_format=torch.channels_last) if last else images
    with torch.no_grad():
        assert torch.equal(plain(images), defended(images))


@pytest.mark.parametrize("spec", ["tiny+tte:3", "tiny+csr", "tiny+jpeg:75", "tiny+et3", "tiny+clipure"])
def test_gradients_are_the_same_in_either_layout(spec: str) -> None:
    model, found = load_classifier(spec, ["apple", "dog"], ["{}"], cache=False), []
    images = torch.rand(2, 3, 64, 64)
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = images.clone(memory_format=layout).requires_grad_()
        logits = model(pixels)
        (grad,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), pixels)
        found.append((logits.detach(), grad))
    (logits, grad), (other, turned) = found
    assert torch.allclose(logits, other, atol=1e-4)
    assert float((grad - turned).norm() / grad.norm()) < 1e-3

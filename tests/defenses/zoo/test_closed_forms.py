"""Defences against what is known of them by hand."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from defended_small import classifier, images
from PIL import Image
from torch import Tensor

from robustvlm.defenses.zoo.base import generators
from robustvlm.defenses.zoo.clipure import turned, turned_at_once
from robustvlm.defenses.zoo.gradients import Steering
from robustvlm.defenses.zoo.jpeg import compressed
from robustvlm.defenses.zoo.pixels import Bits, Blur, Median
from robustvlm.defenses.zoo.views import CROP_DRAWS, crops, drawn, features_of
from robustvlm.defenses.zoo.votes import TestTimeEnsemble, Vote
from robustvlm.defenses.zoo.wrap import gradient_mode


def at_angles(*angles: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features [N, 6] at these signed angles to a text [6] in one plane, and the direction across it."""
    text, across = torch.eye(6, dtype=torch.float64)[:2]
    angle = torch.tensor(angles, dtype=torch.float64)[:, None]
    return angle.cos() * text + angle.sin() * across, text, across


@pytest.mark.parametrize("turn", [turned, turned_at_once])
def test_clipure_subtracts_an_angle_a_step(turn: type[turned]) -> None:  # type: ignore[valid-type]
    step = 0.7
    size = math.tan(step)
    features, text, across = at_angles(0.2, 0.5, 0.9, 1.3)

    def angle(steps: int) -> torch.Tensor:
        found = turn(features, text, steps, size)
        assert torch.allclose(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
        return torch.atan2(found @ across, found @ text)

    assert torch.allclose(angle(0), torch.tensor([0.2, 0.5, 0.9, 1.3], dtype=torch.float64))
    assert torch.allclose(angle(1), torch.tensor([-0.5, -0.2, 0.2, 0.6], dtype=torch.float64))
    # Below the step two of them undo each other; between one and two steps there remains the angle less two steps.
    assert torch.allclose(angle(2), torch.tensor([0.2, 0.5, -0.5, -0.1], dtype=torch.float64))
    assert torch.allclose(angle(10), torch.tensor([0.2, 0.5, -0.5, -0.1], dtype=torch.float64))


def test_clipure_of_an_orthogonal_feature_by_hand() -> None:
    u, t = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0])
    assert torch.allclose(turned(u, t, 1, 1.0), torch.tensor([[1.0, 1.0, 0.0]]) / math.sqrt(2))
    assert torch.isfinite(turned(t[None], t, 3, 30.0)).all()


def test_clipure_has_the_gradient_of_the_function_that_it_is() -> None:
    """Against differences of the steps themselves; and the steps' own derivative agrees where they are few."""
    draws = torch.Generator().manual_seed(0)
    u, t, away = (F.normalize(torch.randn(4, 8, generator=draws, dtype=torch.float64), dim=1) for _ in range(3))
    for steps, size in ((1, 0.4), (3, 0.4), (10, 30.0)):
        given = u.clone().requires_grad_()
        unit = given / given.norm(dim=1, keepdim=True)
        (grad,) = torch.autograd.grad((turned_at_once(unit, t[0], steps, size) * away).sum(), given)
        nudge = torch.randn(u.shape, generator=draws, dtype=torch.float64) * 1e-6
        up, down = ((turned(F.normalize(u + move, dim=1), t[0], steps, size) * away).sum(1) for move in (nudge, -nudge))
        assert torch.allclose((up - down) / 2, (grad * nudge).sum(1), rtol=1e-4, atol=1e-12)


def test_clipure_with_the_released_constants_is_the_undefended_model_where_texts_are_near() -> None:
    features, text, _ = at_angles(0.3, 1.0, 1.5)
    assert (turned(features, text, 10, 30.0) - features).abs().max() < 1e-9


def test_bits_by_hand() -> None:
    x = images()
    levels = (x * 255).round() / 255
    assert torch.allclose(Bits(8).move(levels, None, "identity"), levels, atol=1e-6)  # type: ignore[arg-type]
    found = Bits(3).move(x, None, "identity")  # type: ignore[arg-type]
    assert len((found * 7).round().unique()) <= 8
    assert (found - x).abs().max() <= 0.5 / 7 + 1e-6


def test_filters_leave_constant_images_and_take_out_single_pixels() -> None:
    flat = torch.full((1, 3, 16, 16), 0.3)
    for one in (Median(3), Median(7), Blur(5, 1.1), Blur(31, 4.0)):
        assert torch.allclose(one.move(flat, None, "through"), flat, atol=1e-6)  # type: ignore[arg-type]
    spot = flat.clone()
    spot[..., 8, 8] = 1.0
    assert torch.equal(Median(3).move(spot, None, "through"), flat)  # type: ignore[arg-type]
    blurred = Blur(5, 1.1).move(spot, None, "through")  # type: ignore[arg-type]
    assert torch.allclose(blurred.sum((2, 3)), spot.sum((2, 3)), atol=1e-4)


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_against_pillow(quality: int) -> None:
    """Two codecs round in other places; both lose the same, and ours is much nearer to Pillow's than the image is."""
    grid = torch.linspace(0, 6, 64)
    waves = torch.stack([torch.sin(grid[:, None] * k + grid * (3 - k)) for k in (1, 2, 3)]) / 2 + 0.5
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = ((0.7 * waves + 0.3 * noise) * 255).round()
    buffer = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).byte().numpy()).save(buffer, "JPEG", quality=quality, subsampling=2)
    theirs = torch.tensor(np.array(Image.open(buffer))).permute(2, 0, 1).float()
    ours = 255 * compressed(x[None] / 255, quality)[0]
    assert (ours - theirs).abs().mean() < 0.25 * (x - theirs).abs().mean()
    odd = compressed(images(2)[..., :13, :11], quality)
    assert odd.shape[-2:] == (13, 11)
    assert (compressed(torch.full((1, 3, 20, 20), 0.5), quality) - 0.5).abs().max() <= 1 / 255


def test_jpeg_gradients_climb() -> None:
    """A step along the smooth stand-in's gradient raises what it is the gradient of, more than most random steps."""
    model, x = classifier("jpeg:75"), images(4)
    for mode in ("smooth", "identity"):
        given = x.clone().requires_grad_()
        with gradient_mode(model, mode):
            loss = model(given).logsumexp(1)
        (grad,) = torch.autograd.grad(loss.sum(), given)
        with torch.no_grad():
            climbed = model((x + 0.05 * grad.sign()).clamp(0, 1)).logsumexp(1)
        assert (climbed > loss).float().mean() > 0.5


def test_views_of_one_image() -> None:
    x = images(2)
    views = TestTimeEnsemble(12).views_of(x)
    assert torch.equal(views[:, 0], x)
    assert torch.equal(views[:, 1], x.flip(-1))
    assert torch.allclose(views[:, 7:], views[:, 2:7].flip(-1), atol=1e-6)


def test_a_vote_returns_the_smoothed_shares_of_its_views() -> None:
    x = images(3)
    shares = classifier("vote:4")(x).exp()
    assert torch.allclose(shares.sum(1), torch.ones(3), atol=1e-5)
    counts = shares * (1 + 1 / 8) * 4  # votes, and half a vote shared out
    votes = counts.floor()
    assert torch.equal(votes.sum(1), torch.full((3,), 4.0))
    assert torch.allclose((counts - votes).sum(1), torch.full((3,), 0.5), atol=1e-3)


def test_a_vote_of_one_mind_is_attacked_as_its_mean_probability() -> None:
    voting = Vote(views=4)

    class Straight:
        """Logits that are far apart, so that all views agree."""

        def logits(self, pixels: Tensor) -> Tensor:
            mean = pixels.flatten(1).mean(1)
            return torch.stack([mean * 0, mean * 3 + 4, mean * 2 + 1], 1)

    x, label = images(2).requires_grad_(), torch.tensor([1, 1])
    torch.manual_seed(0)
    found = voting.answer(x, Straight(), "through")  # type: ignore[arg-type]
    assert found.argmax(1).tolist() == [1, 1]
    assert found.argsort(1).tolist() == [[0, 2, 1]] * 2  # the rival is the likeliest of the others, not the first
    (grad,) = torch.autograd.grad(F.cross_entropy(found, label), x)
    torch.manual_seed(0)
    draws = torch.stack([torch.rand(4, CROP_DRAWS, generator=one) for one in generators(x)])
    logits = features_of(Straight().logits, drawn(partial(crops, least=voting.area), draws), x)
    (of_mean,) = torch.autograd.grad(F.nll_loss(logits.softmax(2).mean(1).log(), label), x)
    assert F.cosine_similarity(grad.flatten(1), of_mean.flatten(1)).min() > 0.9999


def test_attacks_are_steered_to_one_side_of_a_gate() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    steering = Steering(x)
    assert torch.equal(steering.pixels, x)
    hinge = torch.stack([steering.pixels[0, 1], -steering.pixels[1, 1]])  # the second is on the right side already
    steering.lower(0.01 * hinge)  # however flat the gate is, the pull is as long as the loss's gradient
    (grad,) = torch.autograd.grad(2 * steering.pixels[:, 0].sum(), x)
    assert grad.tolist() == [[2.0, -2.0], [2.0, 0.0]]


def test_an_anchor_of_noisy_copies_by_hand() -> None:
    x = images(2)
    plain, anchored, halfway = (classifier(*written) for written in ((), ("aom:0.1:3:1",), ("aom:0.1:3:0.5",)))
    torch.manual_seed(0)
    found = anchored.vlm.encode_image(x)  # type: ignore[union-attr]
    torch.manual_seed(0)
    for row, draws in enumerate(generators(x)):
        noise = 0.1 * torch.randn(3, x[0].numel(), generator=draws).view(3, *x.shape[1:])
        copies = plain.vlm.encode_image(x[row] + noise)  # type: ignore[union-attr]
        torch.testing.assert_close(found[row], F.normalize(copies.mean(0), dim=0))
    torch.manual_seed(0)
    half = halfway.vlm.encode_image(x)  # type: ignore[union-attr]
    own = plain.vlm.encode_image(x)  # type: ignore[union-attr]
    torch.testing.assert_close(half, F.normalize(own + 0.5 * (found - own), dim=1))

"""DBD against what is known of it by hand: its score and both of its answers, its views, and its gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from defended_small import classifier, images
from torch import Tensor
from torchvision.transforms import functional as tv

from robustvlm.defenses.zoo.base import SMOOTH
from robustvlm.defenses.zoo.dbd import DirectionalBias, averaged, drift, in_three_bits, noisy, surest
from robustvlm.defenses.zoo.wrap import gradient_mode

FEW = DirectionalBias(crops=3, noises=2, kept=6)


class Plane:
    """A model whose features are the first two pixels, scaled to length one, and so are its logits."""

    logit_scale, size = 1.0, 4

    def encode(self, pixels: Tensor) -> Tensor:
        return F.normalize(pixels.flatten(1)[:, :2], dim=1)

    def scores(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1)

    def logits(self, pixels: Tensor) -> Tensor:
        return self.scores(self.encode(pixels))


class Given(DirectionalBias):
    """The defence with views whose features are given; the image's own is (1, 0)."""

    features: Any = None

    def views_of(self, *_: Any) -> list[Any]:
        return [lambda x, at=at: at.expand(len(x), -1).reshape(len(x), 2) for at in self.features]


def answered(features: list[list[float]], mode: str = SMOOTH, **strengths: Any) -> Tensor:
    one = Given(**{"kept": len(features), **strengths})
    object.__setattr__(one, "features", torch.tensor(features))
    x = torch.tensor([[1.0, 0.0]])
    return one.answer(x, Plane(), mode)[0]  # type: ignore[arg-type]


def test_the_planar_example() -> None:
    """All views at (0, 1): the score is 1, and 2.5 (0, 1) - 1.5 (1, 0) the answer."""
    torch.testing.assert_close(answered([[0.0, 1.0]] * 3), F.normalize(torch.tensor([-1.5, 2.5]), dim=0))
    torch.testing.assert_close(answered([[0.0, 1.0]] * 3, threshold=1.1), torch.tensor([0.0, 1.0]))


def test_equal_views_are_the_image() -> None:
    torch.testing.assert_close(answered([[1.0, 0.0]] * 4), torch.tensor([1.0, 0.0]))
    score, direction = drift(torch.tensor([[0.6, 0.8]]), torch.tensor([[[0.6, 0.8]] * 3]))
    assert score.item() == 0
    assert not direction.any()


def test_a_score_by_hand() -> None:
    # Seen from (1, 0), views at (0, 1) and (0, -1) lie at right angles, each at 45 degrees to their mean.
    score, direction = drift(torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]))
    assert score.item() == pytest.approx(0.5**0.5)
    assert direction.tolist() == [[-1.0, 0.0]]


def test_below_the_threshold_the_image_has_no_say() -> None:
    x = torch.tensor([[0.8, 0.6]], requires_grad=True)
    one = Given(kept=2, threshold=1.1)
    object.__setattr__(one, "features", torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
    found = one.answer(x, Plane(), SMOOTH)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], F.normalize(torch.tensor([0.6, 1.8]), dim=0))
    assert not torch.autograd.grad(found[0, 0], x)[0].any()


def test_the_surest_views_are_used() -> None:
    features = torch.arange(4.0)[None, :, None]
    logits = torch.tensor([[[0.0, 1.0], [0.0, 5.0], [0.0, 0.0], [4.0, 0.0]]])
    assert sorted(surest(features, logits, 2).flatten().tolist()) == [1.0, 3.0]


def test_three_bits_of_every_level() -> None:
    levels = np.arange(256)
    x = torch.tensor(levels / 255, dtype=torch.float32)
    for rounding, wanted in (
        (torch.floor, levels // 32 * 32),
        (torch.ceil, -(-levels // 32) * 32),
        (torch.round, np.round(levels / 32).astype(int) * 32),
    ):
        for wrap in (True, False):
            found = (255 * in_three_bits(x, rounding, wrap=wrap)).round().numpy()
            assert (found == (wanted % 256 if wrap else wanted.clip(max=255))).all()
    assert in_three_bits(x, torch.ceil, wrap=True)[-1] == 0
    assert in_three_bits(x, torch.round, wrap=True)[240] == 0


def test_noise_and_filters() -> None:
    x = images(2)
    noise = 0.1 * torch.randn(2, x[0].numel(), generator=torch.Generator().manual_seed(0))
    found = noisy(x, noise)
    wanted = (255 * (x + noise.view_as(x)).clamp(0, 1)).floor()
    torch.testing.assert_close(255 * found, wanted, atol=1e-4, rtol=0)
    flat = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(averaged(flat), flat)
    torch.testing.assert_close(averaged(x)[..., 4, 7], x[..., 2:7, 5:10].mean((2, 3)))
    view = DirectionalBias().views_of(x, Plane(), SMOOTH)[-1](x)
    torch.testing.assert_close(view, tv.gaussian_blur(x, [5, 5], [1.1, 1.1]), atol=1e-5, rtol=0)


def test_there_are_the_views_of_the_release() -> None:
    x = images(1)
    views = [view(x) for view in DirectionalBias().views_of(x, Plane(), SMOOTH)]
    assert len(views) == DirectionalBias().views == 31
    assert all(view.shape == x.shape and view.min() >= 0 and view.max() <= 1 for view in views)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 31


def test_the_gate_is_leant_on_from_both_sides() -> None:
    """Against the gradient of a plain answer with the gain of that side, to which a pull at the score is added."""
    x = images(3)
    written = "dbd:crops=2:noises=1:kept=5"
    grads = {}
    for mode in ("gate:on", "gate:off", "smooth"):
        for extra in ("", ":threshold=-1.1", ":threshold=1.1"):
            model, given = classifier(written + extra), x.clone().requires_grad_()
            torch.manual_seed(0)
            with gradient_mode(model, mode):
                grads[mode, extra] = torch.autograd.grad(model(given)[:, 0].sum(), given)[0]
    # Beyond reach of the hinge, a forced side is the gradient of that very side.
    torch.testing.assert_close(grads["gate:on", ":threshold=-1.1"], grads["smooth", ":threshold=-1.1"])
    torch.testing.assert_close(grads["gate:off", ":threshold=1.1"], grads["smooth", ":threshold=1.1"])
    assert not torch.allclose(grads["gate:on", ""], grads["gate:off", ""])


def test_views_in_parts_are_views_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2)
    found = []
    for rows in (4, 1000):
        monkeypatch.setitem(DirectionalBias.answer.__globals__["features_of"].__kwdefaults__, "rows_per_pass", rows)
        model, given = classifier("dbd:crops=2:noises=1"), x.clone().requires_grad_()
        torch.manual_seed(0)
        output = model(given)
        found.append((output.detach(), torch.autograd.grad(output[:, 0].sum(), given)[0]))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    assert replace(FEW, crops=0).views == 11

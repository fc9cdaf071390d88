"""TTP and R-TPT's views: closed cases of their parts and of their answers, on a small encoder."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.defenses.zoo import base, rtpt, ttp, views


class _Below:
    """A model of three classes on a small random network, for images of side 14, in double precision."""

    size, logit_scale = 14, 10.0

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(588, 16), nn.Tanh(), nn.Linear(16, 5)).double()
            self.classes = F.normalize(torch.randn(3, 5), dim=1).double()
        self.net.requires_grad_(False)
        self.asked = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.asked += len(pixels)
        return F.normalize(self.net(pixels), dim=1)

    def scores(self, features: Tensor) -> Tensor:
        return self.logit_scale * features @ self.classes.T

    def logits(self, pixels: Tensor) -> Tensor:
        return self.scores(self.encode(pixels))


@pytest.fixture(scope="module")
def below() -> _Below:
    return _Below()


def _images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# TTP


def test_a_frame_is_where_it_should_be_and_as_bright_as_said() -> None:
    x = torch.full((1, 3, 14, 14), 0.25, dtype=torch.float64)
    assert torch.equal(ttp.framed(x, None, 0), x)
    grey = torch.full((1, 3, 28, 28), 2.5, dtype=torch.float64)  # a quarter of white: nothing is seen of the frame
    torch.testing.assert_close(ttp.framed(x, grey, 7), x)
    # As wide a frame as half the side leaves a quarter of the area, in the middle.
    black = ttp.framed(x, None, 7)
    assert black[0, 0, 0, 0] == 0
    assert black.mean().item() == pytest.approx(0.25 / 4, rel=0.05)
    assert black[0, 0, 7, 7].item() == pytest.approx(0.25, rel=1e-3)


def test_a_step_on_the_frame_lowers_the_mean_entropy(below: _Below) -> None:
    x = _images(2)[:, None]
    frame = torch.full((2, 3, 18, 18), 5.0, dtype=torch.float64)

    def uncertainty(found: Tensor) -> Tensor:
        return ttp.entropies(below.logits(ttp.framed(x[:, 0], found, 2)))

    moved = ttp.tuned_frame(below.logits, x, frame, width=2, rate=0.5)
    assert (uncertainty(moved) < uncertainty(frame)).all()
    leaf = frame.clone().requires_grad_()
    (grad,) = torch.autograd.grad(uncertainty(leaf).sum(), leaf)
    torch.testing.assert_close(moved, frame - 0.5 * grad)
    assert torch.equal(ttp.tuned_frame(below.logits, x, frame, width=2, rate=0.0), frame)


@pytest.mark.parametrize("mode", ttp.TunedPadding.modes)
def test_ttp_gives_the_plain_answer_where_the_gate_is_shut(below: _Below, mode: str) -> None:
    x, few = _images(), ttp.TunedPadding(views=3, kept=2)
    for shut in (replace(few, border=0.0), replace(few, tau=-1.1)):
        torch.testing.assert_close(shut.answer(x, below, mode), below.logits(x))


def test_one_view_and_no_step_is_the_answer_behind_the_first_frame(below: _Below) -> None:
    x = _images()
    torch.manual_seed(0)
    found = ttp.TunedPadding(tau=1.1, views=1, kept=1, rate=0.0).answer(x, below, "identity")
    torch.manual_seed(0)
    frames = torch.stack([10 * torch.rand(3, 18, 18, generator=one) for one in base.generators(x)])
    wanted = below.logits(ttp.framed(x, frames.double(), 2)).softmax(1)
    torch.testing.assert_close(found.exp(), wanted)


@pytest.mark.parametrize("gate_open", [False, True])
def test_ttp_takes_the_passes_that_it_says(below: _Below, gate_open: bool) -> None:
    found = ttp.TunedPadding(tau=1.1 if gate_open else -1.1, views=5, kept=2)
    before = below.asked
    with torch.no_grad():
        found.answer(_images(), below, "identity")
    assert (below.asked - before) / 3 == found.cost(gate_open=gate_open).forward


def test_ttp_is_the_same_in_every_mode_and_its_gate_has_a_gradient(below: _Below) -> None:
    x = _images().requires_grad_()
    found, grads = [], []
    for mode in ttp.TunedPadding.modes:
        torch.manual_seed(1)
        found.append(ttp.TunedPadding(tau=1.1, views=4, kept=2).answer(x, below, mode))
        grads.append(torch.autograd.grad(found[-1][:, 0].sum(), x)[0])
    assert all(torch.equal(one, found[0]) for one in found)
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(grads))


# R-TPT's views


def test_reliability_against_a_loop() -> None:
    features = F.normalize(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2)), dim=2)
    found = rtpt.reliability(features, 3)
    for image in range(2):
        for view in range(6):
            others = sorted(float(features[image, view] @ features[image, k]) for k in range(6) if k != view)
            assert found[image, view].item() == pytest.approx(sum(others[-3:]) / 3, abs=1e-6)


def test_equal_views_weigh_the_same_and_one_view_is_the_image(below: _Below) -> None:
    equal = F.normalize(torch.ones(1, 64, 5), dim=2)
    logits = torch.randn(1, 64, 3, generator=torch.Generator().manual_seed(2))
    reliable = rtpt.reliability(equal, 20)
    torch.testing.assert_close(rtpt.weighted(logits, reliable, 0.01), logits.mean(1))
    x = _images()
    assert torch.equal(rtpt.ReliableViews(views=1).answer(x, below, "through"), below.logits(x))


def test_rtpt_weights_the_views_that_it_draws(below: _Below) -> None:
    x = _images()
    torch.manual_seed(4)
    found = rtpt.ReliableViews(views=5, neighbours=2).answer(x, below, "identity")
    torch.manual_seed(4)
    for place, one in enumerate(base.generators(x)):
        drawn = torch.rand(4, views.CROP_DRAWS, generator=one)
        rows = torch.cat([x[place][None], views.crops(x[place].expand(4, -1, -1, -1), drawn)])
        features = below.encode(rows)
        near = features @ features.T - 2 * torch.eye(5)
        weights = (near.topk(2, dim=1).values.mean(1) / 0.01).softmax(0)
        torch.testing.assert_close(found[place], weights @ below.logits(rows))

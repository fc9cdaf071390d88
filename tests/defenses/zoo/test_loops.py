"""Defences that optimise their input: closed forms of their steps, and what an attack's gradient sees of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustvlm.defenses.zoo import agc, antiadv, csr, et3, inner, ttc
from robustvlm.models.custom import CustomVLM


def _images(count: int = 2, side: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return 0.2 + 0.6 * drawn


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A small smooth network in double precision: [B, 3, 6, 6] to [B, 4], its weights open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, 4)).double()


# Parts that all of them share


def _wave(v: Tensor) -> Tensor:
    return v.sin().sum((1, 2, 3))


def test_a_recomputed_step_has_the_gradient_of_the_step_itself() -> None:
    x = _images().requires_grad_()

    def step(y: Tensor, x: Tensor, graph: bool = False) -> Tensor:
        return y + 0.3 * inner.score_gradient(_wave, y, graph=graph)[1] * x

    y = x
    for _ in range(3):
        y = inner.recomputed(step, lambda y, x: step(y, x, graph=True), y, x)
    direct = x
    for _ in range(3):
        direct = direct + 0.3 * direct.cos() * x
    assert torch.equal(y, direct)
    grads = [torch.autograd.grad(found.square().sum(), x)[0] for found in (y, direct)]
    torch.testing.assert_close(*grads)


def test_no_gradient_is_left_on_weights_and_callers_without_one_are_served(net: nn.Module) -> None:
    x = _images()
    with torch.no_grad():
        _, grad = inner.score_gradient(lambda v: net(v).sum(1), x)
        moved = et3.descended(net, x, steps=2, step=0.1, reach=0.2, through=True)
    assert grad.abs().sum() > 0
    assert not moved.requires_grad
    assert not torch.equal(moved, x)
    y = x.clone().requires_grad_()
    et3.descended(net, y, steps=2, step=0.1, reach=0.2, through=True).sum().backward()
    assert y.grad is not None
    assert all(p.grad is None for p in net.parameters())


def test_a_random_encoder_draws_the_same_on_the_way_back() -> None:
    x = _images().requires_grad_()
    seen = []

    def step(y: Tensor) -> Tensor:
        seen.append(torch.randn(3))
        return y * seen[-1].sum()

    found = inner.recomputed(step, step, x)
    following = torch.randn(1)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(grad, seen[0].sum().double().expand_as(x))
    assert not torch.equal(following, torch.randn(1))


def test_the_value_is_the_same_to_the_bit_in_every_mode(net: nn.Module) -> None:
    x = _images().requires_grad_()
    noise = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) - 1
    counter = {"eps": 0.03, "size": 0.01, "steps": 2, "beta": 2.0}
    rectify = {"radius": 1.0, "threshold": 2.0, "steps": 2, "size": 0.01, "eps": 0.03}
    unit = lambda v: F.normalize(net(v), dim=1)  # noqa: E731
    ways = (
        lambda through: et3.descended(net, x, steps=2, step=0.7, reach=0.02, through=through),
        lambda smooth: antiadv.strengthened(net, x, steps=2, size=0.01, smooth=smooth),
        lambda smooth: ttc.countered(net, x, noise, **counter, smooth=smooth).image(10.0),
        lambda smooth: csr.rectified(unit, x, **rectify, smooth=smooth).image,
    )
    for way in ways:
        plain, through = way(False), way(True)
        assert torch.equal(plain, through)
        assert not torch.equal(plain, x)
        # The identity's gradient, to the bit, in one mode; another one in the other.
        straight, seen = (torch.autograd.grad(found.square().sum(), x)[0] for found in (plain, through))
        assert torch.equal(straight, 2 * plain.detach())
        assert not torch.allclose(seen, straight)


class _Attending(nn.Module):
    """A smooth network of one attention layer: [B, 3, 6, 6] to [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(12, 24), nn.Linear(8, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = F.unfold(pixels, 2, stride=2).transpose(1, 2)
        query, key, value = (4 * self.inside(tokens)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out(F.gelu(found.transpose(1, 2).flatten(2))).mean(1)


def test_attention_has_a_second_derivative_and_it_is_right() -> None:
    # In double precision, against the quotient of differences along a random direction.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        logits = _Attending().double().requires_grad_(False)
    x = _images(1).requires_grad_()
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def after(v: Tensor, through: bool = True) -> Tensor:
        return logits(et3.descended(logits, v, steps=2, step=0.3, reach=1.0, through=through)).square().sum()

    grad, straight = (torch.autograd.grad(after(x, through), x)[0] for through in (True, False))
    with torch.no_grad():
        slope = (after(x + 1e-6 * way) - after(x - 1e-6 * way)) / 2e-6
    torch.testing.assert_close((grad * way).sum(), slope, rtol=1e-5, atol=1e-7)
    assert not torch.allclose((straight * way).sum(), slope, rtol=1e-3)


def test_a_users_encoder_gives_the_same_second_derivative() -> None:
    class Own:
        image_size, logit_scale = 6, 10.0

        def encode_image(self, pixels: Tensor) -> Tensor:
            return (1e-3 * pixels.flatten(1).view(len(pixels), 4, -1).pow(3)).sum(-1)

        def encode_text(self, texts: list[str]) -> Tensor:
            return torch.eye(4)[: len(texts)]

    own, x = Own(), _images().requires_grad_()
    wrapped = CustomVLM(own, spec="own")

    def moved(logits) -> Tensor:
        return et3.descended(logits, x, steps=1, step=0.3, reach=0.5, through=True)

    found, wanted = moved(wrapped.embed_image), moved(own.encode_image)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad((v * x.detach()).sum(), x)[0] for v in (found, wanted)]
    torch.testing.assert_close(*grads)


def test_steps_are_in_full_precision_whatever_the_attack_runs_in(net: nn.Module) -> None:
    single, x = copy.deepcopy(net).float(), _images(dtype=torch.float32)
    noise = torch.ones_like(x)
    counter = {"eps": 0.03, "size": 0.01, "steps": 2, "beta": 2.0}
    ways = (
        lambda: et3.descended(single, x, steps=2, step=0.1, reach=0.05),
        lambda: antiadv.strengthened(single, x, steps=2, size=0.01),
        lambda: ttc.countered(single, x, noise, **counter).ratio,
        lambda: csr.rectified(single, x, radius=1, threshold=1e9, steps=2, size=0.01, eps=0.02).image,
    )
    for way in ways:
        with torch.autocast("cpu", torch.bfloat16):
            assert single(x).dtype == torch.bfloat16
            half = way()
        assert torch.equal(half, way())


def test_attention_kernels_are_as_they_were() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with inner.twice_differentiable():
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


# Each one's closed cases


def _with_nothing_to_do(x: Tensor, net: nn.Module):
    unit = lambda v: F.normalize(net(v), dim=1)  # noqa: E731
    numbers = {"radius": 3, "threshold": 0.85, "steps": 3, "size": 0.01, "eps": 0.02}
    for through in (False, True):
        yield et3.descended(net, x, steps=2, step=0.0, reach=0.1, through=through)
        yield et3.descended(net, x, steps=0, step=1.0, reach=0.1, through=through)
        yield antiadv.strengthened(net, x, steps=2, size=0.0, smooth=through)
        yield antiadv.strengthened(net, x, steps=0, size=0.1, smooth=through)
        yield csr.rectified(unit, x, **(numbers | {"radius": 1e9}), smooth=through).image  # all-pass
        yield csr.rectified(unit, x, **(numbers | {"eps": 0.0, "threshold": 2.0}), smooth=through).image
        yield csr.rectified(unit, x, **(numbers | {"steps": 0, "threshold": 2.0}), smooth=through).image
        yield csr.rectified(unit, x, **(numbers | {"threshold": -1.0}), smooth=through).image


def test_no_strength_is_no_change_to_the_bit(net: nn.Module) -> None:
    x = _images()
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    x.requires_grad_()
    for image in _with_nothing_to_do(x, net):
        assert torch.equal(image, x)
        (grad,) = torch.autograd.grad((image * x.detach()).sum(), x)
        assert torch.equal(grad, x.detach())


def test_et3_on_linear_logits_is_one_step_along_the_mean_weight() -> None:
    x = _images()
    weight = torch.randn(5, 108, generator=torch.Generator().manual_seed(3)).double()

    def logits(v: Tensor) -> Tensor:
        return v.flatten(1) @ weight.T

    along = logits(x).softmax(1) @ weight
    wanted = x + 0.05 * (along / along.norm(dim=1, keepdim=True)).view_as(x)
    torch.testing.assert_close(et3.descended(logits, x, steps=1, step=0.05, reach=1.0), wanted)
    # Two classes alike: along the sum of their weights.
    same = weight[[0, 1]].clone()
    same[1] = same[0].flip(0)
    level = torch.full((1, 3, 6, 6), 0.5, dtype=torch.float64)
    moved = et3.descended(lambda v: v.flatten(1) @ same.T, level, steps=1, step=0.1, reach=1.0) - level
    torch.testing.assert_close(F.normalize(moved.flatten(), dim=0), F.normalize(same.sum(0), dim=0))


def test_et3_stays_in_its_box_and_the_energy_falls(net: nn.Module) -> None:
    x = _images()
    moved = et3.descended(net, x, steps=4, step=3.0, reach=0.05)
    assert (moved - x).abs().max() <= 0.05 + 1e-12
    assert (et3.energy(net(moved)) < et3.energy(net(x))).all()


def test_ttc_on_a_linear_encoder_grows_the_noise_to_the_bound() -> None:
    x = torch.full((2, 3, 6, 6), 0.5, dtype=torch.float64)
    noise = 2 * _images(seed=4) - 1
    step = {"eps": 0.03, "size": 0.01, "steps": 1}
    found = ttc.countered(lambda v: v.flatten(1), x, noise, **step, beta=200.0)  # all weight on the last point
    wanted = (0.03 * noise.abs() + 0.01).clamp_max(0.03) * noise.sign()
    torch.testing.assert_close(found.moved - x, wanted)
    torch.testing.assert_close(found.ratio, 0.03 * noise.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))
    # The gate: nothing below zero, everything below ten; each image by itself.
    assert torch.equal(found.image(0.0), found.noisy)
    assert torch.equal(found.image(10.0), found.moved)
    one = ttc.Countered(found.noisy, found.moved, torch.tensor([0.1, 0.3]))
    assert torch.equal(one.image(0.2)[0], found.moved[0])
    assert torch.equal(one.image(0.2)[1], found.noisy[1])


def test_ttc_mixes_its_points_by_the_weights() -> None:
    x = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    noise = torch.full_like(x, 0.1)
    found = ttc.countered(lambda v: v.flatten(1), x, noise, eps=0.1, size=0.02, steps=2, beta=2.0)
    points = torch.tensor([0.01, 0.03, 0.05]).double()
    wanted = (torch.tensor([0.01587624, 0.11731043, 0.86681333]).double() * points).sum()
    torch.testing.assert_close((found.moved - x).flatten(), wanted.expand(3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_gates_have_gradients(net: nn.Module, smooth: bool) -> None:
    x = _images().requires_grad_()
    ratio = ttc.countered(
        net, x, torch.ones_like(x), eps=0.1, size=0.05, steps=1, beta=2.0, smooth=smooth, lean=True
    ).ratio
    unit = lambda v: F.normalize(net(v), dim=1)  # noqa: E731
    same = csr.rectified(
        unit, x, radius=1, threshold=2, steps=1, size=0.1, eps=0.1, smooth=smooth, lean=True
    ).similarity
    for score in (ratio, same):
        assert torch.autograd.grad(score.sum(), x, retain_graph=True)[0].abs().amax() > 0


def test_antiadv_makes_the_model_surer_of_its_answer(net: nn.Module) -> None:
    x = _images()
    before, after = net(x), net(antiadv.strengthened(net, x, steps=2, size=0.05))
    answer = before.argmax(1)
    assert torch.equal(after.argmax(1), answer)
    assert (F.cross_entropy(after, answer, reduction="none") < F.cross_entropy(before, answer, reduction="none")).all()
    # Two steps of .05 with nothing clipped.
    moved = antiadv.strengthened(net, x.new_ones(1, 3, 6, 6), steps=2, size=0.05) - 1
    assert set(moved.flatten().mul(20).round().int().tolist()) <= {-2, 0, 2}
    assert moved.max() > 0.09


def test_csr_keeps_the_best_point_and_moves_what_is_told() -> None:
    # A feature on the circle whose angle is the mean pixel: the blurred copy's is the same, so only held gates move.
    def feature(v: Tensor) -> Tensor:
        angle = 4 * v.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)

    x = _images()
    numbers = {"radius": 2.0, "threshold": 0.85, "steps": 3, "size": 0.02, "eps": 0.04}
    assert torch.equal(csr.rectified(feature, x, **numbers).image, x)
    target = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), dim=1)
    moved = csr.best_of_way(feature, x, target, steps=3, size=0.02, eps=0.04, smooth=False)
    torch.testing.assert_close(moved, x - 0.04)  # towards angle 0, as far as it may
    # Where every step makes it worse, the image itself is the best.
    zero = torch.zeros_like(x)
    assert torch.equal(csr.best_of_way(feature, zero, target, steps=3, size=0.02, eps=0.04, smooth=False), zero)


def test_csr_moves_only_images_on_the_open_side(net: nn.Module) -> None:
    unit = lambda v: F.normalize(net(v), dim=1)  # noqa: E731
    x = _images(4)
    numbers = {"radius": 0.5, "steps": 2, "size": 0.02, "eps": 0.04}
    similarity = csr.rectified(unit, x, threshold=-1, **numbers).similarity
    between = similarity.sort().values[1:3].mean().item()
    found = csr.rectified(unit, x, threshold=between, **numbers).image
    alone = torch.cat([csr.rectified(unit, row[None], threshold=between, **numbers).image for row in x])
    torch.testing.assert_close(found, alone)
    assert [torch.equal(a, b) for a, b in zip(found, x, strict=True)] == (similarity >= between).tolist()


def test_a_low_pass_keeps_slow_waves_and_drops_fast_ones() -> None:
    side = 16
    place = torch.arange(side).double() / side * 2 * torch.pi
    for slow, fast in itertools.product((1, 2), (6, 8)):
        wave = [0.2 * (k * place).cos()[None, None, None, :].expand(1, 3, side, side) for k in (slow, fast)]
        found = csr.low_pass(0.5 + wave[0] + wave[1], 3.0)
        damped = [torch.exp(torch.tensor(-(k**2) / 18.0)).double() for k in (slow, fast)]
        torch.testing.assert_close(found, 0.5 + damped[0] * wave[0] + damped[1] * wave[1])


def test_agc_closed_cases() -> None:
    own = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    mean = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    nil, one = torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(agc.along_circle(own, mean, nil), own)
    torch.testing.assert_close(agc.along_circle(own, mean, one), mean)
    torch.testing.assert_close(agc.along_circle(own, own, one), own)
    beyond = agc.along_circle(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([2.0]))
    torch.testing.assert_close(beyond, torch.tensor([[-0.28, 0.96]]))
    views = F.normalize(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3)), dim=2)
    beta, unit = agc.correction(own, views)
    assert ((beta >= 0.45) & (beta <= 2.25)).all()
    # The pairs, one by one.
    for row in range(3):
        pairs = [float(views[row, i] @ views[row, j]) for i in range(5) for j in range(5) if i != j]
        attack = min(1.0, max(0.0, float((1 - views[row] @ own[row]).mean())))
        wanted = 0.45 + 1.8 * attack**0.9 * (1 + sum(pairs) / 20) / 2
        assert beta[row].item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(unit, F.normalize(views.sum(1), dim=1))


def test_agc_has_a_gradient_everywhere() -> None:
    own = torch.eye(2, 8).requires_grad_()
    views = own.detach()[:, None].expand(2, 4, 8).clone()
    views[1, 0] = torch.eye(8)[5]
    views.requires_grad_()
    beta, mean = agc.correction(own, views)
    found = agc.along_circle(own, mean, beta)
    assert torch.equal(found[0], own[0])
    assert beta[0].item() == pytest.approx(0.45)
    for grad in torch.autograd.grad(found[:, :3].sum(), (own, views)):
        assert grad.isfinite().all()
        assert grad[1].abs().sum() > 0


def test_a_single_view_is_trusted_wholly() -> None:
    own, view = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    twice = agc.correction(own, view.expand(1, 2, 2))[0]  # two views that agree
    assert torch.equal(agc.correction(own, view)[0], twice)

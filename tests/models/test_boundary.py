"""What a user's code does to pixels, outputs and the process stays on its side; half precision loses no gradient."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustvlm as rv
from robustvlm.attacks import PGD, Job, LaneEngine, Oracle, ThreatModel
from robustvlm.core.boundary import Boundary, same_process, same_random_state
from robustvlm.errors import UserError

WEIGHT = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def pixels(rows: int = 4, *, grad: bool = False) -> Tensor:
    return torch.rand(rows, 3, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)


def plain(x: Tensor) -> Tensor:
    return ((x - 0.5) / 0.25).flatten(1) @ WEIGHT


def in_place(x: Tensor) -> Tensor:
    return x.sub_(0.5).div_(0.25).flatten(1) @ WEIGHT


@pytest.mark.parametrize("grad", [False, True])
def test_an_in_place_function_is_as_good_as_another(grad: bool) -> None:
    x = pixels(grad=grad)
    before = x.detach().clone()
    wanted = Boundary(plain, what="f")(x)
    assert torch.equal(Boundary(in_place, what="f")(x), wanted)
    assert torch.equal(x, before)
    if grad:
        (found,) = torch.autograd.grad(Boundary(in_place, what="f")(x).square().sum(), x)
        y = pixels(grad=True)
        (right,) = torch.autograd.grad(plain(y).square().sum(), y)
        assert torch.equal(found, right)  # scaled by powers of two: not a bit is different


class Normalising(nn.Module):
    """Normalises its input in place, or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return in_place(x) if self.in_place else plain(x)


def test_attacks_and_certificates_from_python_hand_over_copies() -> None:
    x = pixels()
    before, label = x.clone(), plain(x).argmax(1)
    torch.manual_seed(0)
    found = [rv.perturb(Normalising(in_place=way), x, label, eps=0.05, attack="pgd", steps=3) for way in (True, False)]
    assert torch.equal(found[0].images, found[1].images)
    votes = [rv.certify_tensors(rv.Smoothed(Normalising(in_place=way), 0.25), x, n=100) for way in (True, False)]
    assert torch.equal(votes[0].radius, votes[1].radius)
    assert votes[0].radius.max() > 0
    assert torch.equal(x, before)


def test_outputs_cannot_be_changed_behind_our_back() -> None:
    kept = torch.zeros(4, 3)
    ask = Boundary(lambda x: kept.copy_(plain(x)), what="f")
    first = ask(pixels())
    copy = first.clone()
    ask(pixels() / 2)
    assert torch.equal(first, copy)
    wide = Boundary(lambda x: x.sum((1, 2, 3))[:, None].expand(-1, 3), what="f")(pixels())
    wide[0, 0] = 7  # an expanded view would share its columns
    assert wide[0, 1] != 7


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: (plain(x), x), "must return a tensor of 4 rows for 4 images, got a tuple"),
        (lambda x: {"logits": plain(x)}, "got a dict"),
        (lambda x: plain(x).detach().numpy(), "got a ndarray"),
        (lambda x: plain(x)[:1].squeeze(0), r"got torch.float32 \[3\]"),
        (lambda x: plain(x)[:2], r"got torch.float32 \[2, 3\]"),
        (lambda x: plain(x).argmax(1, keepdim=True), r"got torch.int64 \[4, 1\]"),
        (lambda x: plain(x.detach()), "has no gradient, which gradient attacks need: leave out no_grad"),
        (torch.inference_mode()(plain), "has no gradient, which gradient attacks need"),
    ],
)
def test_other_answers_get_one_line(function: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Boundary(function, what="'my:model'")(pixels(grad=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_float32_whatever_comes(dtype: torch.dtype) -> None:
    ask = Boundary(lambda x: plain(x.float()).to(dtype), what="f")
    assert ask(pixels()).dtype == torch.float32
    assert ask(pixels().double()).dtype == torch.float64 if dtype == torch.float64 else ask.in_half


def halved(x: Tensor) -> Tensor:
    """Linear logits in float16, so sure that cross-entropy has gradients that float16 cannot hold."""
    return ((x.flatten(1) - 0.5) @ (WEIGHT * 8)).half() * 8


def test_half_precision_is_fooled_as_often_as_its_copy_in_full() -> None:
    class Net(nn.Module):
        def __init__(self, half: bool) -> None:
            super().__init__()
            self.half_output = half

        def forward(self, x: Tensor) -> Tensor:
            return halved(x) if self.half_output else ((x.flatten(1) - 0.5) @ (WEIGHT * 8)) * 8

    x = pixels(8)
    label = Net(half=False)(x).argmax(1)
    loss = nn.functional.cross_entropy(halved(x.requires_grad_()).float(), label, reduction="none")
    assert (torch.autograd.grad(loss.sum(), x)[0].flatten(1).abs().amax(1) == 0).any()  # lost without the scale
    fooled = []
    for half in (False, True):
        engine = LaneEngine(Oracle(Net(half)), PGD(n_iter=4), ThreatModel("Linf", 0.3), lanes=8, seed=0)
        jobs = [Job(str(i), i, x[i].detach(), label=int(label[i])) for i in range(8)]
        fooled.append({result.job.index for result in engine.run(jobs) if result.outcome == "fooled"})
    assert fooled[0] == fooled[1]
    assert len(fooled[0]) >= 4


def test_small_and_large_gradients_come_back_to_scale() -> None:
    ask = Boundary(lambda x: x.flatten(1).half() @ WEIGHT.half(), what="f")
    for size in (1e-30, 1e-9, 1.0, 1e6):
        x = pixels(grad=True)
        (found,) = torch.autograd.grad(size * ask(x)[:, 0].sum(), x)
        assert torch.allclose(found.flatten(1) / size, WEIGHT.half().float()[:, 0].expand(4, -1), rtol=2e-3)


def test_a_module_in_half_precision_that_leaves_the_cast_to_us() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).bfloat16()
    ask = Boundary(net, what="f", parts=net)
    assert ask.in_half
    with torch.no_grad():
        assert ask.settle(pixels()).dtype == torch.float32
    (grad,) = torch.autograd.grad(ask(x := pixels(grad=True)).sum(), x)
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0


@pytest.fixture
def process() -> Iterator[None]:
    with same_process():
        yield


@pytest.mark.usefixtures("process")
def test_what_a_function_sets_for_the_process_is_put_back() -> None:
    def rude(x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        torch.manual_seed(0)
        return plain(x)

    ask = Boundary(rude, what="f")
    ask.settle(pixels())
    torch.manual_seed(5)
    ask(pixels())
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)  # a function that seeds would make noise around it repeat
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark


def test_a_random_function_stays_random() -> None:
    ask = Boundary(lambda x: plain(x) + torch.rand(len(x), 1), what="f")
    ask.settle(pixels())
    assert not torch.equal(ask(pixels()), ask(pixels()))


def test_random_states_are_put_back() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with same_random_state():
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_weights_that_are_trained_get_their_own_gradient() -> None:
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), pixels(grad=True)
    Boundary(net, what="f", parts=net)(x).square().sum().backward()
    found, of_pixels = net[1].weight.grad, x.grad
    assert found is not None
    net.zero_grad()
    y = pixels(grad=True)
    net(y).square().sum().backward()
    torch.testing.assert_close(found, net[1].weight.grad)
    torch.testing.assert_close(of_pixels, y.grad)

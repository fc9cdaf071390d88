"""Parts without gradient: exact values forward, a stand-in backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustvlm.attacks import PGD, Job, LaneEngine, Oracle, ThreatModel
from robustvlm.attacks.honesty import open_gradients, straight_through
from robustvlm.errors import UserError


class Quantise(nn.Module):
    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        return (x * 15).round() / 15


class Threshold(nn.Module):
    """Half as many values, by a hard threshold; its surrogate is a steep sigmoid."""

    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, ::2] > 0.5).to(x.dtype)

    def surrogate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(8 * (x.flatten(1)[:, ::2] - 0.5))


class Smaller(nn.Module):
    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2].round()


def test_values_are_exact_and_gradients_those_of_the_surrogate() -> None:
    part = Threshold()
    x = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    plain = part(x.detach())
    (wanted,) = torch.autograd.grad((part.surrogate(x) * weights).sum(), x)
    assert len(open_gradients(part)) == 1
    y = part(x)
    assert torch.equal(y, plain)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(grad, wanted)


def test_without_gradients_nothing_but_the_part_is_run() -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError("the surrogate is for gradients")

    x = torch.rand(2, 2)
    assert torch.equal(straight_through(torch.round, x, never), x.round())
    with torch.no_grad():
        assert torch.equal(straight_through(torch.round, x.requires_grad_(), never), x.round())


def test_other_parts_are_left_alone_and_a_second_call_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Quantise(), nn.Flatten(), nn.Linear(12, 2))
    before, names = model(torch.full((1, 3, 2, 2), 0.3)), list(model.state_dict())
    said = open_gradients(model)
    assert said == open_gradients(model)
    assert len(said) == 1
    assert "part '1' (Quantise)" in said[0]
    assert list(model.state_dict()) == names
    assert torch.equal(model(torch.full((1, 3, 2, 2), 0.3)), before)
    assert open_gradients(nn.Sequential(nn.Linear(2, 2))) == []


def test_shapes_that_do_not_fit_are_named() -> None:
    part = Smaller()
    open_gradients(part)
    with pytest.raises(UserError, match=r"returns \[1, 3, 2, 4\], but its input is \[1, 3, 4, 4\].*surrogate"):
        part(torch.rand(1, 3, 4, 4, requires_grad=True))
    part = Smaller()
    part.surrogate = 3  # type: ignore[assignment]
    with pytest.raises(UserError, match="must be a function, got 3"):
        open_gradients(part)


def fooled(model: nn.Module) -> int:
    x = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    labels = model(x).argmax(1).tolist()
    jobs = [Job(f"image-{i}", i, x[i], labels[i]) for i in range(len(x))]
    engine = LaneEngine(Oracle(model), PGD(n_iter=10), ThreatModel("Linf", 0.1), lanes=8, seed=0)
    return sum(result.outcome == "fooled" for result in engine.run(jobs))


def test_an_attack_sees_through_quantised_inputs() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    masked = nn.Sequential(Quantise(), head)
    blind = fooled(masked)
    open_gradients(masked)
    assert fooled(masked) >= blind + 8

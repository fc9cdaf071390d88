"""PGD inside training: bounds, dependence on the image alone, and modules left as they were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tower import images, small_vlm
from torch import Tensor, nn

from robustvlm.attacks import ThreatModel
from robustvlm.attacks.threat import l2_norms
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.finetune.methods import frozen
from robustvlm.errors import UserError
from robustvlm.training import Draws

IDS = ("a", "b", "c", "d")


def target(x: Tensor, _: Tensor | None) -> Tensor:
    return small_vlm().embed_image(x).square().sum()


@given(
    norm=st.sampled_from(["Linf", "L2"]),
    eps=st.floats(0.01, 0.9),
    steps=st.integers(1, 4),
    start=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_images_stay_in_the_ball_and_in_the_pixel_range(
    norm: str, eps: float, steps: int, start: bool, seed: int
) -> None:
    x, _ = images(4, seed)
    attack = InnerAttack(threat=ThreatModel(norm, eps), steps=steps, random_start=start)
    found, texts = attack(target, x, Draws(seed, 0, IDS))
    assert texts is None
    assert found.min() >= 0
    assert found.max() <= 1
    delta = found.double() - x.double()
    assert (delta.abs().amax() if norm == "Linf" else l2_norms(delta).max()) <= eps


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_image_is_perturbed_alike_in_any_batch(norm: str) -> None:
    x, _ = images(4)
    attack = InnerAttack(threat=ThreatModel(norm, 0.1), steps=3)
    whole, _ = attack(target, x, Draws(0, 5, IDS))
    part, _ = attack(target, x[2:], Draws(0, 5, IDS[2:]))
    torch.testing.assert_close(part, whole[2:], atol=1e-6, rtol=0)
    other, _ = attack(target, x, Draws(0, 6, IDS))
    assert not torch.allclose(other, whole, atol=1e-4)


def test_loss_rises_and_more_steps_raise_it_further() -> None:
    x, _ = images(4)
    attack = InnerAttack(threat=ThreatModel("L2", 0.2), steps=1, random_start=False)
    values = [target(replace(attack, steps=n)(target, x, Draws(0, 0, IDS))[0], None).item() for n in (1, 5, 20)]
    assert target(x, None).item() < values[0] < values[1] < values[2]


def test_linear_loss_is_solved_exactly() -> None:
    x, w = torch.full((1, 3, 2, 2), 0.5), torch.tensor([1.0, -2.0, 0.0]).view(1, 3, 1, 1)
    found, _ = InnerAttack(threat=ThreatModel("Linf", 0.25), steps=2, random_start=False)(
        lambda a, _: (a * w).sum(), x, Draws(0, 0, ["a"])
    )
    torch.testing.assert_close(found - x, (0.25 * w.sign()).expand_as(x))


def test_texts_are_perturbed_within_their_own_ball() -> None:
    x, _ = images(4)
    texts = torch.zeros(3, 6)
    found, delta = InnerAttack(threat=ThreatModel("Linf", 0.1), steps=2)(
        lambda a, d: small_vlm().embed_image(a).sum() + (d * torch.arange(6)).sum(),  # type: ignore[operator]
        x,
        Draws(0, 0, IDS),
        texts=texts,
        eps_text=2e-4,
    )
    assert delta is not None
    expected = torch.full((3, 6), 2e-4)
    expected[:, 0] = 0  # whatever the loss does not depend on is left alone
    torch.testing.assert_close(delta, expected)
    assert not found.requires_grad
    assert not delta.requires_grad


def test_gradients_that_are_not_finite_leave_the_image_in_the_ball() -> None:
    x, _ = images(2)
    found, _ = InnerAttack(threat=ThreatModel("L2", 0.1), steps=2)(
        lambda a, _: (a.sum() - a.sum()).sqrt(), x, Draws(0, 0, IDS[:2])
    )
    assert torch.isfinite(found).all()
    assert l2_norms(found - x).max() <= 0.1


def test_nothing_is_left_in_the_parameters_and_modes_come_back() -> None:
    vlm = small_vlm().requires_grad_(True)
    vlm.proj.requires_grad_(False)
    vlm.blocks[1].train()
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    flags = {name: p.requires_grad for name, p in vlm.named_parameters()}
    with frozen(vlm):
        assert not any(part.training for part in vlm.modules())
        InnerAttack(steps=2)(lambda a, _: vlm.embed_image(a).sum(), images(4)[0], Draws(0, 0, IDS))
    assert {name: p.requires_grad for name, p in vlm.named_parameters()} == flags
    assert [name for name, part in vlm.named_modules() if part.training] == [
        name for name, _ in vlm.named_modules() if name.startswith("blocks.1")
    ]
    assert all(p.grad is None for p in vlm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    layer = nn.Linear(1, 1)
    with pytest.raises(RuntimeError), frozen(layer):
        raise RuntimeError
    assert layer.training
    assert layer.weight.requires_grad


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"step_size": 0.0}, {"step_size": float("nan")}])
def test_impossible_attacks_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="inner attack"):
        InnerAttack(**wrong)  # type: ignore[arg-type]

"""AGFT and UCAT: closed forms, limits that are other methods, gradients, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tower import NAMES, SmallVLM, images, make_task, small_vlm
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from robustvlm.attacks import ThreatModel
from robustvlm.defenses.finetune import InnerAttack
from robustvlm.defenses.finetune.guided import dirichlet_divergence
from robustvlm.errors import UserError
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws

DRAWS = Draws(0, 3, list("abcdef"))
STILL = InnerAttack(threat=ThreatModel("Linf", 1e-9), steps=1, random_start=False)
ATTACK = InnerAttack(threat=ThreatModel("Linf", 0.05), steps=2)


def cosines(vlm: SmallVLM, pixels: Tensor) -> Tensor:
    """Return cosines to the texts of the model before training, which no small_vlm of this file changes."""
    return vlm.encode_image(pixels) @ class_embeddings(small_vlm(), NAMES, ("{}", "a {}")).T


def away(step: float = 0.05) -> SmallVLM:
    """Return an encoder a little away from the original, as after some steps of training; its texts are the same."""
    student, draws = small_vlm(), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name not in ("table.weight", "text_projection"):
                parameter.add_(step * torch.randn(parameter.shape, generator=draws))
    return student


def test_agft_is_the_divergence_from_the_original_at_both_scales_and_its_attack_raises_it() -> None:
    """Against a second implementation: value and gradient at the end of an attack on the same divergence."""
    pixels, labels = images()
    plain, student = small_vlm(), away()
    task = make_task(vlm := small_vlm(), "agft", attack=ATTACK, options={"scale": 1.5, "ratio": 0.5})
    vlm.load_state_dict(student.state_dict())
    loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
    loss.backward()
    target = (7.5 * cosines(plain, pixels)).softmax(1).detach()

    def divergence(x: Tensor) -> Tensor:
        log_q = 15 * cosines(student, x) - (15 * cosines(student, x)).logsumexp(1, keepdim=True)
        return (target * (target.log() - log_q)).sum(1)

    worst = ATTACK(lambda x, _: divergence(x).sum(), pixels, DRAWS)[0]
    student.zero_grad()  # the attack above leaves none, and nothing else may
    expected = divergence(worst).mean()
    expected.backward()
    assert expected > divergence(pixels).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vlm.proj.grad, student.proj.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(vlm.stem.weight.grad, student.stem.weight.grad, rtol=1e-3, atol=1e-6)


def test_agft_begins_at_its_optimum_where_the_targets_are_not_softened() -> None:
    pixels, labels = images()
    task = make_task(vlm := small_vlm(), "agft", attack=STILL, options={"scale": 1.0, "ratio": 1.0})
    loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert vlm.proj.grad is not None
    assert float(vlm.proj.grad.norm()) < 1e-5


def test_agft_with_hard_targets_is_tecoa_on_the_classes_that_the_original_says() -> None:
    pixels, _ = images()
    said = cosines(small_vlm(), pixels).argmax(1)
    student = away()
    found = {}
    for name, options in (("tecoa", {}), ("agft", {"scale": 1.0, "ratio": 1e5})):
        task = make_task(vlm := small_vlm(), name, attack=ATTACK, options=options)
        vlm.load_state_dict(student.state_dict())
        found[name] = task.losses(pixels, said, 0, DRAWS)["loss"]
    torch.testing.assert_close(found["agft"], found["tecoa"], rtol=1e-4, atol=1e-5)


def test_agft_reads_no_labels() -> None:
    pixels, labels = images()
    task = make_task(small_vlm(), "agft")
    assert not task.labelled
    first, second = (task.losses(pixels, some, 0, DRAWS)["loss"] for some in (labels, labels.flip(0)))
    assert torch.equal(first, second)


def test_ucat_without_weight_is_tecoa_in_value_and_gradient() -> None:
    pixels, labels = images()
    found = {}
    for name, options in (("tecoa", {}), ("ucat", {"weight": 0.0})):
        task = make_task(vlm := small_vlm(), name, attack=ATTACK, options=options)
        vlm.load_state_dict(away().state_dict())
        loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
        loss.backward()
        found[name] = (loss.detach(), vlm.proj.grad, vlm.stem.weight.grad)
    for ours, theirs in zip(found["ucat"], found["tecoa"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ucat_is_tecoa_and_the_divergence_of_dirichlets_at_the_same_images() -> None:
    pixels, labels = images()
    plain, student = small_vlm(), away()
    task = make_task(vlm := small_vlm(), "ucat", attack=STILL, options={"weight": 3.0, "temperature": 0.5})
    vlm.load_state_dict(student.state_dict())
    terms = task.losses(pixels, labels, 0, DRAWS)
    ours, theirs = (((cosines(tower, pixels).double() + 1) / 0.5).exp() for tower in (student, plain))
    unit = ((cosines(plain, images(5, seed=2)[0]).double() + 1) / 0.5).exp().sum(1).mean()
    apart = kl_divergence(Dirichlet(ours), Dirichlet(theirs)).mean() / unit
    torch.testing.assert_close(terms["uncertainty"], apart.float(), rtol=1e-4, atol=1e-6)
    robust = F.cross_entropy(10 * cosines(student, pixels), labels)
    torch.testing.assert_close(terms["loss"], robust + 3 * apart.float(), rtol=1e-4, atol=1e-5)
    assert task.method.settings()["mean concentration"] == pytest.approx(float(unit.detach()), rel=1e-5)


def test_ucat_at_large_concentrations_weighs_the_divergence_of_proportions() -> None:
    """What the unit of `weight` rests on: KL(Dir(a) || Dir(b)) nears B KL(b / B || a / A)."""
    draws = torch.Generator().manual_seed(3)
    first, second = (torch.rand(4, 6, generator=draws, dtype=torch.float64) + 0.5 for _ in range(2))
    p, q = (values / values.sum(-1, keepdim=True) for values in (first, second))
    expected = (q * (q.log() - p.log())).sum(-1)
    found = [dirichlet_divergence(s * first, s * second) / (s * second).sum(-1) for s in (10.0, 1e3, 1e6, 1e9)]
    errors = [float((value - expected).abs().max()) for value in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < 1e-6


def test_ucat_sees_how_sure_a_model_is_where_proportions_agree() -> None:
    b = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    assert float(dirichlet_divergence(b, b)) == pytest.approx(0, abs=1e-12)
    assert float(dirichlet_divergence(3 * b, b)) > 0.1
    assert float(dirichlet_divergence(b / 3, b)) > 0.1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.05, 1e6), st.floats(0.05, 1e6)), min_size=2, max_size=6))
def test_dirichlet_divergence_agrees_with_torch_and_is_no_less_than_zero(pairs: list[tuple[float, float]]) -> None:
    first, second = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    found = dirichlet_divergence(first, second)
    torch.testing.assert_close(found, kl_divergence(Dirichlet(first), Dirichlet(second)), rtol=1e-6, atol=1e-4)
    assert float(found) > -1e-4


def test_dirichlet_divergence_has_the_gradient_of_its_differences() -> None:
    draws = torch.Generator().manual_seed(4)
    first, second = (torch.rand(3, 4, generator=draws, dtype=torch.float64) + 0.3 for _ in range(2))
    assert torch.autograd.gradcheck(dirichlet_divergence, (first.requires_grad_(), second.requires_grad_()))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("agft", {"scale": 0.0}, "'scale' of agft must be positive"),
        ("agft", {"ratio": -1.0}, "'ratio' of agft must be positive"),
        ("ucat", {"weight": -1.0}, "'weight' of ucat must be 0 or more"),
        ("ucat", {"temperature": math.inf}, "'temperature' of ucat must be positive and finite"),
        ("ucat", {"temperature": 1e-4}, "concentrations of ucat"),
    ],
)
def test_bad_options_are_said(method: str, options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_task(small_vlm(), method, options=options)

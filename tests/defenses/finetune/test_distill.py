"""Distillation: the limit that is AGFT, a second implementation with another teacher, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_tower import NAMES, SmallVLM, images, make_task, small_vlm
from torch import Tensor

from robustvlm.attacks import ThreatModel
from robustvlm.defenses.finetune import FinetuneSettings, InnerAttack, finetune_task
from robustvlm.errors import UserError
from robustvlm.models.zero_shot import class_embeddings
from robustvlm.training import Draws

DRAWS = Draws(0, 3, list("abcdef"))
ATTACK = InnerAttack(threat=ThreatModel("Linf", 0.05), steps=2)
NONE = {"labels": 0.0, "features": 0.0, "contrast": 0.0}


def taught(
    teacher: SmallVLM, student: SmallVLM, method: str = "distill", **options: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient of the projection and the terms of one step, of a copy of the student."""
    vlm = copy.deepcopy(student)
    task = finetune_task(
        vlm,
        FinetuneSettings(method=method, attack=ATTACK, options=options),
        class_names=NAMES,
        templates=("{}", "a {}"),
        calibration=images(5, seed=2)[0],
        in_place=True,
        teacher=teacher,
    )
    pixels, labels = images()
    terms = task.losses(pixels, labels, 0, DRAWS)
    terms["loss"].backward()
    assert isinstance(vlm.proj.grad, Tensor)
    return vlm.proj.grad, {name: term.detach() for name, term in terms.items()}


def test_taught_by_itself_without_other_terms_it_is_agft() -> None:
    pixels, labels = images()
    found = {}
    for name, options in (("agft", {}), ("distill", NONE)):
        task = make_task(vlm := small_vlm(), name, attack=ATTACK, options=options)
        with torch.no_grad():
            vlm.proj.add_(0.1)
        loss = task.losses(pixels, labels, 0, DRAWS)["loss"]
        loss.backward()
        found[name] = (loss.detach(), vlm.proj.grad, vlm.stem.weight.grad)
    for ours, theirs in zip(found["distill"], found["agft"], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_another_teacher_by_hand() -> None:
    pixels, labels = images()
    teacher, student = small_vlm(1), small_vlm(0)
    slope, terms = taught(teacher, student, labels=0.5, features=2.0, contrast=0.25)

    def texts(vlm: SmallVLM) -> Tensor:
        return class_embeddings(vlm, NAMES, ("{}", "a {}"))

    goal = teacher.encode_image(pixels).detach()
    p = (10 * goal @ texts(teacher).T).softmax(1).detach()
    said = texts(student)

    def divergence(x: Tensor) -> Tensor:
        return (p * (p.log() - (10 * student.encode_image(x) @ said.T).log_softmax(1))).sum(1)

    worst = ATTACK(lambda x, _: divergence(x).sum(), pixels, DRAWS)[0]
    student.zero_grad()
    found = student.encode_image(worst)
    robust = F.cross_entropy(10 * found @ said.T, labels)
    near = sum(((a - b) ** 2).sum() for a, b in zip(found, goal, strict=True)) / len(found)
    picked = -torch.stack([(10 * found @ goal.T).log_softmax(1)[i, i] for i in range(len(found))]).mean()
    expected = divergence(worst).mean() + 0.5 * robust + 2 * near + 0.25 * picked
    expected.backward()
    torch.testing.assert_close(terms["loss"], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slope, student.proj.grad, rtol=1e-3, atol=1e-5)


def test_steps_lead_towards_the_teacher_and_leave_it_alone() -> None:
    teacher, student = small_vlm(1), small_vlm(0)
    before, (pixels, labels) = copy.deepcopy(teacher.state_dict()), images()
    task = finetune_task(
        student,
        FinetuneSettings(method="distill", attack=ATTACK, options={"labels": 0.0}),
        class_names=NAMES,
        templates=("{}", "a {}"),
        calibration=pixels,
        in_place=True,
        teacher=teacher,
    )
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(25):
        optimiser.zero_grad()
        loss = task.losses(pixels, labels, step, DRAWS)["loss"]
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_what_cannot_teach() -> None:
    wide = SmallVLM(dimensions=7).eval()
    with pytest.raises(UserError, match="features=0"):
        taught(wide, small_vlm())
    assert "soft" in taught(wide, small_vlm(), features=0.0, contrast=0.0)[1]
    with pytest.raises(UserError, match="'features' of distill must be 0 or more"):
        taught(small_vlm(1), small_vlm(), features=-1.0)
    with pytest.raises(UserError, match="tecoa learns from no other model"):
        taught(small_vlm(1), small_vlm(), "tecoa")

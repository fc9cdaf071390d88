"""The vaccine: the identity at the start, gradients, what stops it, and the same result from the same seed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from robustvlm.defenses.immunity import vaccine
from robustvlm.defenses.immunity.prototypes import fit_prototypes, log_normaliser
from robustvlm.defenses.immunity.recipe import make_targets
from robustvlm.defenses.immunity.state import AdaptedVLM, Adapter
from robustvlm.defenses.immunity.vaccine import (
    Targets,
    VaccineSettings,
    automatic_margin,
    log_likelihoods,
    mix,
    pull,
    push,
    pushed_share,
    unsure,
    vaccinate,
)
from robustvlm.errors import UserError
from robustvlm.models import load_model


def cloud(seed: int, noise: float = 0.5, count: int = 40, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    return F.normalize(torch.eye(dim)[labels] + noise * torch.randn(count, dim, generator=draws), dim=-1), labels


def some_targets(dim: int = 12) -> Targets:
    return Targets(torch.eye(dim)[:4, None], torch.full((4,), 10.0), torch.zeros(4), torch.eye(dim)[4:6])


SETTINGS = VaccineSettings(hidden=16, steps=60, lr=3e-3, decay=0.0)
STRONG = replace(SETTINGS, push_weight=20.0, margin=-1.0)


def test_adapter_begins_as_the_identity_and_is_one_in_an_encoder() -> None:
    features, _ = cloud(0)
    assert torch.allclose(Adapter(12, 8)(features), features, atol=1e-6)
    vlm = load_model("tiny")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    adapted = AdaptedVLM(vlm, Adapter(192, 8))
    assert torch.allclose(adapted.encode_image(pixels), vlm.encode_image(pixels), atol=1e-6)
    assert torch.equal(adapted.encode_text(["a dog"]), vlm.encode_text(["a dog"]))
    assert adapted.fingerprint != vlm.fingerprint


def test_the_first_gradient_reaches_the_last_layer_and_agrees_with_differences() -> None:
    adapter = Adapter(6, 5, seed=1).double()
    torch.nn.init.normal_(adapter.outer.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    z = F.normalize(torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=-1)
    labels, kappa = torch.tensor([0, 1, 2]), torch.full((3,), 5.0, dtype=torch.float64)
    prototypes, antibodies = torch.eye(6).double()[:3, None], torch.eye(6).double()[3:5]

    def loss(rows: torch.Tensor) -> torch.Tensor:
        adapted = adapter(rows)
        return pull(adapted, labels, prototypes, kappa, torch.zeros(3).double()) + push(adapted, antibodies, -0.5)

    assert torch.autograd.gradcheck(loss, (z.requires_grad_(True),))
    fresh = Adapter(6, 5).requires_grad_(True)
    pull(fresh(z.detach().float()), labels, prototypes.float(), kappa.float(), torch.zeros(3)).backward()
    assert fresh.outer.weight.grad is not None
    assert fresh.outer.weight.grad.abs().max() > 0


def test_likelihoods_are_those_of_the_von_mises_fisher_law() -> None:
    features, labels = cloud(1)
    prototypes = fit_prototypes(features, labels, torch.eye(12)[:4])
    targets = make_targets(prototypes, torch.zeros(0, 12), kappa="class", logit_scale=1.0)
    log_c = torch.from_numpy(log_normaliser(prototypes.kappa.double().numpy(), 12))
    cosines = features.double() @ prototypes.vectors[:, 0].double().T
    expected = (log_c + prototypes.kappa.double() * cosines).log_softmax(dim=1)
    found = log_likelihoods(features, targets.prototypes, targets.kappa, targets.log_c).double().log_softmax(dim=1)
    assert torch.allclose(found, expected, atol=1e-4)
    shared = make_targets(prototypes, torch.zeros(0, 12), kappa="model", logit_scale=7.0)
    assert torch.equal(shared.log_c, torch.zeros(4))
    assert shared.kappa.tolist() == [7.0] * 4
    with pytest.raises(UserError, match="model or class"):
        make_targets(prototypes, torch.zeros(0, 12), kappa="own", logit_scale=1.0)


def test_push_is_the_squared_hinge() -> None:
    z, antibodies = F.normalize(torch.tensor([[3.0, 4.0]]), dim=-1), torch.eye(2)
    assert float(push(z, antibodies, 0.5)) == pytest.approx((0.1**2 + 0.3**2) / 2)
    assert float(push(z, torch.zeros(0, 2), 0.5)) == 0.0
    assert float(push(z, antibodies, 0.5, nearest=1)) == pytest.approx(0.3**2)
    far = torch.cat([antibodies, -torch.eye(2).repeat(50, 1)])  # antibodies that nothing is near to
    assert float(push(z, far, 0.5, nearest=2)) == pytest.approx(float(push(z, antibodies, 0.5)))
    assert float(push(z, far, 0.5)) < 0.05 * float(push(z, antibodies, 0.5))
    assert torch.equal(push(z, antibodies, 0.5, nearest=10), push(z, antibodies, 0.5))
    assert pushed_share(z, antibodies, 0.7) == 0.5
    assert pushed_share(z, antibodies, 0.9) == 0.0
    assert automatic_margin(z, torch.zeros(0, 2)) == 0.2


def test_the_automatic_margin_is_passed_by_a_tenth_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the antibodies are near to all images and half to none: the mean of quantiles lies between them.
    draws = torch.Generator().manual_seed(0)
    images = F.normalize(torch.tensor([1.0, 0.0, 0.0]) + 0.05 * torch.randn(200, 3, generator=draws), dim=1)
    near = F.normalize(torch.tensor([1.0, 0.3, 0.0]) + 0.1 * torch.randn(20, 3, generator=draws), dim=1)
    antibodies = torch.cat([near, -near])
    margin = automatic_margin(images, antibodies)
    assert pushed_share(images, antibodies, margin) == pytest.approx(0.1, abs=0.001)
    monkeypatch.setattr(vaccine, "_PAIRS", 1000)
    assert automatic_margin(images, antibodies) == pytest.approx(margin, abs=0.01)


def test_mixtures_lie_on_the_arc_between_an_image_and_an_antibody() -> None:
    features, antibodies = cloud(5)[0], torch.eye(12)[4:7]
    found = mix(features, antibodies, torch.Generator().manual_seed(1))
    assert torch.allclose(found.points.norm(dim=1), torch.ones(len(features)))
    between = [
        F.normalize(found.share[:, None] * features + (1 - found.share[:, None]) * one, dim=1) for one in antibodies
    ]
    near = torch.stack([(found.points - points).norm(dim=1) for points in between]).amin(dim=0)
    assert float(near.max()) < 1e-5
    assert 0.2 < float(found.share.mean()) < 0.8
    assert float(found.share.std()) > 0.15


def test_the_loss_of_a_mixture_is_pull_at_the_image_and_even_at_the_antibody() -> None:
    features, labels = cloud(6)
    targets = some_targets()
    whole, none = torch.ones(len(features)), torch.zeros(len(features))
    likely = log_likelihoods(features, targets.prototypes, targets.kappa, targets.log_c)
    expected = F.cross_entropy(likely, torch.full((len(features), 4), 0.25))
    assert torch.allclose(unsure(features, none, labels, targets), expected)
    drawn = pull(features, labels, targets.prototypes, targets.kappa, targets.log_c)
    assert torch.allclose(unsure(features, whole, labels, targets), drawn)
    half = unsure(features, whole / 2, labels, targets)
    assert torch.allclose(half, (drawn + expected) / 2)


def test_without_weight_mixing_changes_no_digit_and_with_it_the_classes_grow_less_sure_between() -> None:
    features, labels = cloud(2)
    held, held_labels = cloud(3)
    runs = {
        weight: vaccinate(
            features, labels, held, held_labels, some_targets(), replace(SETTINGS, push_weight=0.0, mix_weight=weight)
        )
        for weight in (0.0, 5.0)
    }
    plain = vaccinate(features, labels, held, held_labels, some_targets(), replace(SETTINGS, push_weight=0.0))
    assert all(map(torch.equal, plain.adapter.state_dict().values(), runs[0.0].adapter.state_dict().values()))
    assert runs[5.0].chosen > 0
    mixed = mix(held, some_targets().antibodies, torch.Generator().manual_seed(8))
    before, after = (
        float(unsure(adapt(mixed.points), mixed.share, held_labels, some_targets()))
        for adapt in (lambda rows: rows, runs[5.0].adapter)
    )
    assert after < before - 0.05


def test_training_lowers_the_loss_and_pushes_from_antibodies() -> None:
    features, labels = cloud(2)
    held, held_labels = cloud(3)
    done = vaccinate(features, labels, held, held_labels, some_targets(), STRONG)
    first = done.history[0]
    kept = next(look for look in done.history if look.step == done.chosen)
    assert done.chosen > 0
    assert kept.held_out < first.held_out
    assert kept.accuracy >= first.accuracy
    before, after = ((rows @ torch.eye(12)[4:6].T).mean() for rows in (features, done.adapter(features)))
    assert after < before


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another() -> None:
    features, labels = cloud(2)
    held, held_labels = cloud(3)
    runs = [
        vaccinate(features, labels, held, held_labels, some_targets(), replace(STRONG, seed=seed)).adapter
        for seed in (0, 0, 1)
    ]
    first, again, other = (run.outer.weight for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_vaccine_that_harms_is_not_given() -> None:
    features, labels = cloud(2)
    held, held_labels = cloud(3, noise=0.2)
    wrong = (labels + 1) % 4  # teaches every class as another one
    done = vaccinate(features, wrong, held, held_labels, some_targets(), SETTINGS)
    assert done.chosen == 0
    assert torch.allclose(done.adapter(held), held, atol=1e-6)


def test_training_goes_on_from_an_adapter_and_leaves_it_alone() -> None:
    features, labels = cloud(2)
    held, held_labels = cloud(3)
    first = vaccinate(features, labels, held, held_labels, some_targets(), SETTINGS)
    weights = first.adapter.outer.weight.clone()
    more = vaccinate(features, labels, held, held_labels, some_targets(), SETTINGS, start=first.adapter)
    kept = next(look for look in first.history if look.step == first.chosen)
    assert more.history[0].held_out == pytest.approx(kept.held_out, abs=1e-6)
    assert torch.equal(first.adapter.outer.weight, weights)


def test_bad_settings_and_images() -> None:
    for wrong in ({"hidden": 0}, {"lr": 0.0}, {"push_weight": -1.0}, {"margin": 2.0}, {"decay": math.nan}):
        with pytest.raises(UserError):
            VaccineSettings(**wrong)  # type: ignore[arg-type]
    features, labels = cloud(2)
    with pytest.raises(UserError, match="needs images"):
        vaccinate(features, labels, features[:0], labels[:0], some_targets(), SETTINGS)
    with pytest.raises(UserError, match="not finite"):
        vaccinate(features * math.nan, labels, features, labels, some_targets(), SETTINGS)

"""The audit catches certificates that are false and leaves true ones alone, on encoders whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from analytic_encoders import Analytic, Circle, HalfSpace, along, image_at
from scipy.special import ndtr
from torch import Tensor

from robustvlm.certify.claims import Quantity, upper_mean
from robustvlm.certify.claims.class_ import ClassQuantity
from robustvlm.certify.claims.feature import FeatureQuantity
from robustvlm.certify.claims.vote import VoteQuantity
from robustvlm.certify.feature import vector_radius
from robustvlm.certify.normal import Array
from robustvlm.commands.certify.audit_balls import into_ball, lengths
from robustvlm.commands.certify.audit_search import (
    Effort,
    Finding,
    Target,
    audit_image,
    descend,
    gradient,
    starts,
)
from robustvlm.defenses import SmoothedVLM, smooth
from robustvlm.errors import UserError

SIGMA = 0.5
NORMS = {"circle": math.exp(-0.125), "half-space": 2.0 * float(ndtr(0.9 / SIGMA)) - 1.0}
ENCODERS: dict[str, Callable[[], Analytic]] = {"circle": Circle, "half-space": HalfSpace}
TEXT = np.array([[1.0, 0.0], [0.0, 1.0]])  # classes at 0 and 90 degrees


def feature(radius: float, *, r: float | None = None, cos0: float = 0.5) -> Callable[[Array, Array], Quantity]:
    def make(steering: Array, evidence: Array) -> Quantity:
        u = steering.mean(axis=0)
        return FeatureQuantity(
            sigma=SIGMA, cos0=cos0, radius=radius, r=r, direction=u / np.linalg.norm(u), clean=evidence
        )

    return make


def run(vlm: SmoothedVLM, radius: float, claim: Callable[[Array, Array], Quantity], *, seed: int = 0) -> list[Finding]:
    target = Target(image_id="a", pixels=image_at(0.0), radius=radius, claim=claim)
    return audit_image(vlm, target, Effort(evidence=2000), alpha=0.001, seed=seed)


@pytest.mark.parametrize("name", ["circle", "half-space"])
def test_a_true_feature_certificate_stands(name: str) -> None:
    radius = vector_radius(NORMS[name], 0.5, SIGMA)
    findings = run(smooth(ENCODERS[name](), SIGMA), radius, feature(radius, r=NORMS[name]))
    assert [finding.fraction for finding in findings] == [0.25, 0.5, 0.75, 1.0]
    assert not any(finding.broken for finding in findings)
    assert all(finding.eps < radius for finding in findings)
    assert findings[-1].bound == 0.5
    assert findings[0].bound > findings[-1].bound  # the whole curve is held against the attack


@pytest.mark.parametrize("name", ["circle", "half-space"])
def test_a_radius_three_times_too_large_is_caught(name: str) -> None:
    radius = 3.0 * vector_radius(NORMS[name], 0.5, SIGMA)
    assert any(finding.broken for finding in run(smooth(ENCODERS[name](), SIGMA), radius, feature(radius)))


def test_a_curve_that_is_too_high_is_caught_inside_the_radius() -> None:
    # r = 0.9999 claims a cosine of 0.99 where the truth is cos(0.5) = 0.88.
    findings = run(smooth(Circle(), SIGMA), 1.0, feature(1.0, r=0.9999))
    assert findings[1].broken


def test_a_bound_that_is_exactly_attained_is_not_called_broken() -> None:
    # The features turn by eps exactly: cosine 0.5 is reached at the radius, and half of all estimates lie below it.
    vlm, radius = smooth(Circle(), SIGMA), math.pi / 3
    ends = [run(vlm, radius, feature(radius), seed=seed)[-1] for seed in range(6)]
    assert min(finding.lowest for finding in ends) == pytest.approx(0.5, abs=0.05)
    assert not any(finding.broken for finding in ends)


def test_the_attack_reaches_the_closed_form() -> None:
    lowest = run(smooth(Circle(), SIGMA), 1.2, feature(1.2))[-1].lowest
    assert lowest == pytest.approx(math.cos(1.2), abs=0.05)


class Step(HalfSpace):
    """The half-space encoder without any gradient: cut off (as in user code), or zero everywhere."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.cut = cut

    def _image_features(self, pixels: Tensor) -> Tensor:
        sign = torch.where(along(pixels) <= self.b, 1.0, -1.0)
        sign = sign if self.cut else sign + 0.0 * pixels.flatten(1).sum(dim=1)
        return torch.stack([sign, 1e-3 * torch.ones_like(sign)], dim=-1)


@pytest.mark.parametrize("cut", [True, False])
def test_an_encoder_without_a_gradient_is_searched_without(cut: bool) -> None:
    radius, text = 0.9, TEXT * np.array([[1.0], [-1.0]]) @ np.array([[1.0, 0.0], [1.0, 0.0]])
    model = smooth(Step(cut=cut), SIGMA)
    for factor, broken in ((0.95, False), (1.3, True)):
        claim = ClassQuantity(text=text, label=0, radius=factor * radius)
        target = Target(image_id="a", pixels=image_at(0.0), radius=factor * radius, claim=lambda *_, c=claim: c)
        quick = Effort(starts=2, steps=15, choice=64, evidence=1500, fractions=(1.0,))
        (found,) = audit_image(model, target, quick, alpha=0.001, seed=0)
        assert found.start.endswith(", without a gradient")
        assert found.broken == broken


def test_a_certificate_of_another_noise_level_is_refused() -> None:
    with pytest.raises(UserError, match=r"noise of 0\.5, the model's is 0\.25"):
        run(smooth(Circle(), 0.25), 0.1, feature(0.1, r=NORMS["circle"]))


def test_classes_and_votes() -> None:
    vlm = smooth(Circle(), SIGMA)
    boundary = math.pi / 4  # where the classes meet; the image is at 0
    claims: dict[str, Callable[[float], Quantity]] = {
        "class": lambda radius: ClassQuantity(text=TEXT, label=0, radius=radius),
        "vote": lambda radius: VoteQuantity(text=TEXT, label=0, radius=radius, logit_scale=10.0),
    }
    for name, make in claims.items():
        inside, beyond = (
            run(vlm, radius, lambda *_, radius=radius, make=make: make(radius))[-1]
            for radius in (0.9 * boundary, 1.4 * boundary)
        )
        assert not inside.broken, name
        assert beyond.broken, name


def test_runs_are_reproducible_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    vlm = smooth(Circle(), SIGMA)
    assert run(vlm, 0.5, feature(0.5)) == run(vlm, 0.5, feature(0.5))
    assert run(vlm, 0.5, feature(0.5)) != run(vlm, 0.5, feature(0.5), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_point_leaves_the_ball() -> None:
    torch.manual_seed(0)
    vlm, clean, aim = smooth(Circle(), SIGMA), image_at(0.3), torch.zeros(8, dtype=torch.long)
    claim = ClassQuantity(text=TEXT, label=0, radius=0.7)
    begin, kinds = starts(vlm, clean, 0.7, claim.score, aim)
    assert set(kinds) == {"random", "curvature", "encoder", "correlation"}
    assert torch.allclose(lengths(begin).flatten(), torch.tensor(0.7))
    end = descend(vlm, clean, begin, 0.7, claim.score, aim, Effort(steps=5))
    assert (lengths(end - clean) <= 0.7 * (1 + 1e-6)).all()
    assert torch.equal(into_ball(torch.full((1, 4), 0.1), 1.0), torch.full((1, 4), 0.1))


def test_gradients_do_not_depend_on_how_rows_are_grouped() -> None:
    claim = ClassQuantity(text=TEXT, label=0, radius=0.7)
    x, aim = torch.rand(5, 3, 4, 4), torch.zeros(5, dtype=torch.long)

    def grouped(rows: int) -> torch.Tensor:
        return gradient(SmoothedVLM(Circle(), 1e-6, rows_per_pass=rows), x, claim.score, aim, 4)

    assert torch.allclose(grouped(4), grouped(1000), atol=1e-4)


class TestUpperBounds:
    """Wrongly low upper bounds would call true certificates broken; failures must not look like violations."""

    def test_cover_the_mean(self) -> None:
        rng = np.random.default_rng(0)
        bounds = [upper_mean(rng.choice([-1.0, 1.0], 300, p=[0.3, 0.7]), 0.05) for _ in range(300)]
        assert np.mean(np.array(bounds) < 0.4) <= 0.05

    def test_cover_the_cosine(self) -> None:
        rng = np.random.default_rng(1)

        def circle(angle: float, n: int) -> Array:
            z = angle + SIGMA * rng.standard_normal(n)
            return np.stack([np.cos(z), np.sin(z)], axis=1)

        misses = 0
        for _ in range(100):
            claim = feature(1.0)(circle(0.0, 100), circle(0.0, 400))
            misses += claim.upper(circle(0.4, 400), 0.05) < math.cos(0.4)
        assert misses <= 5

    def test_failed_passes_count_for_the_certificate(self) -> None:
        values = np.full(1000, -0.5)
        values[:500] = np.nan
        assert upper_mean(values, 0.01) > 0.2
        features = np.tile([[0.0, 1.0]], (400, 1))
        features[:300] = np.nan
        assert ClassQuantity(text=TEXT, label=0, radius=1.0).upper(features, 0.01) > 0.0
        assert VoteQuantity(text=TEXT, label=0, radius=1.0, logit_scale=1.0).upper(features, 0.01) > 0.5

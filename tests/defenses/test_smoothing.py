"""The smoothed model against closed forms; its noise, memory, hooks and identity."""

from __future__ import annotations

import math

import pytest
import torch
from analytic_encoders import SIDE, Circle, image_at
from torch import Tensor, nn

from robustvlm.defenses import SmoothedVLM, smooth, smoothing
from robustvlm.defenses.smoothing import SmoothedClassifier
from robustvlm.errors import UserError
from robustvlm.models import zero_shot


class Recording(Circle):
    """Keeps every batch of images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def _image_features(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.detach())
        return super()._image_features(pixels)


def test_mean_feature_is_that_of_the_closed_form() -> None:
    torch.manual_seed(0)
    vlm, x, n = smooth(Circle(), 0.5), 0.7, 40_000
    expected = math.exp(-0.125) * torch.tensor([math.cos(x), math.sin(x)])
    assert torch.allclose(vlm.mean_feature(image_at(x), n)[0], expected, atol=4.0 / math.sqrt(n))
    assert torch.allclose(vlm.encode_image(image_at(x)).norm(), torch.tensor(1.0))


def test_gradient_is_that_of_the_closed_form() -> None:
    torch.manual_seed(1)
    x = image_at(0.7).requires_grad_()
    smooth(Circle(), 0.5).mean_feature(x, 20_000)[0, 0].backward()
    assert x.grad is not None
    assert x.grad.sum() / math.sqrt(x.numel()) == pytest.approx(-math.exp(-0.125) * math.sin(0.7), abs=0.02)


def test_recomputed_passes_replay_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient() -> Tensor:
        torch.manual_seed(3)
        x = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).requires_grad_()
        SmoothedVLM(Circle(), 0.5, 10, rows_per_pass=6).encode_image(x)[:, 0].sum().backward()
        assert x.grad is not None
        return x.grad

    recomputed = gradient()
    monkeypatch.setattr(smoothing, "checkpoint", lambda run, *args, **_: run(*args))
    assert torch.equal(gradient(), recomputed)


def test_no_two_rows_share_noise_and_its_law_is_normal() -> None:
    base = Recording()
    vlm, x = SmoothedVLM(base, 0.25, 50, rows_per_pass=20), torch.ones(3, 3, SIDE, SIDE)
    first, second = vlm.encode_image(x), vlm.encode_image(x)
    noise = torch.cat(base.seen).flatten(1) - 1.0
    assert len(noise) == 2 * 3 * 50
    assert len({row.numpy().tobytes() for row in noise}) == len(noise)
    assert max(len(batch) for batch in base.seen) <= 20
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert noise.std().item() == pytest.approx(0.25, rel=0.03)
    assert noise.max() > 0.5  # 1 + noise: nothing is clipped to [0, 1]


def test_noise_is_float32_even_for_half_precision_pixels() -> None:
    base = Recording()
    SmoothedVLM(base, 0.01, 200).encode_image(torch.full((1, 3, SIDE, SIDE), 0.5, dtype=torch.bfloat16))
    seen = torch.cat(base.seen)
    assert seen.dtype == torch.float32
    assert len(seen.unique()) > 5000  # bfloat16 has a few dozen values there


def test_a_batch_larger_than_a_pass_takes_one_draw_at_a_time() -> None:
    base = Recording()
    SmoothedVLM(base, 0.25, 3, rows_per_pass=2).encode_image(torch.rand(5, 3, SIDE, SIDE))
    assert [len(batch) for batch in base.seen] == [5, 5, 5]


def test_noise_is_added_at_the_resolution_of_the_model() -> None:
    base = Recording()
    SmoothedVLM(base, 0.25, 2).encode_image(torch.rand(1, 3, 4 * SIDE, 4 * SIDE))
    assert base.seen[0].shape[-1] == SIDE
    assert SmoothedVLM(base, 0.25, 2).noisy_features(torch.rand(2, 3, 8, 8), 7).shape == (2, 7, 2)


def test_hooks_are_inside_the_expectation() -> None:
    seen: list[Tensor] = []

    def purifier(noisy: Tensor) -> Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    def mapper(features: Tensor) -> Tensor:
        return features.relu() + 1e-3

    plain = SmoothedVLM(Circle(), 0.5, 30, purifier=purifier)
    assert torch.allclose(plain.encode_image(image_at(1.0)), torch.tensor([[1.0, 0.0]]))
    assert seen[0].std() > 0.3
    torch.manual_seed(0)
    mapped = SmoothedVLM(Circle(3.0), 0.5, 30, mapper=mapper).mean_feature(image_at(1.0), 30)
    torch.manual_seed(0)
    rows = SmoothedVLM(Circle(3.0), 0.5, 30).noisy_features(image_at(1.0), 30)[0]
    each = nn.functional.normalize(mapper(rows), dim=-1)
    assert torch.allclose(mapped[0], each.mean(dim=0), atol=1e-6)


def test_identity_covers_model_noise_and_hooks() -> None:
    torch.manual_seed(0)
    layer, base = nn.Linear(2, 2), Circle()
    vlms = [
        base,
        smooth(base, 0.25, 8),
        smooth(Circle(2.0), 0.25, 8),
        smooth(base, 0.25, 16),
        smooth(base, 0.5, 8),
        smooth(base, 0.25, 8, mapper=layer),
        smooth(base, 0.25, 8, purifier=nn.Identity()),
        smooth(base, 0.25, 8, mapper=torch.relu),
    ]
    digests = [vlm.fingerprint for vlm in vlms]
    assert len(set(digests)) == len(digests)
    assert smooth(Circle(), 0.25, 8).fingerprint == digests[1]
    with torch.no_grad():
        layer.weight += 1.0
    assert vlms[5].fingerprint != digests[5]


def test_texts_pass_through() -> None:
    assert torch.equal(smooth(Circle(), 0.25).encode_text(["30", "60"]), Circle().encode_text(["30", "60"]))


@pytest.mark.parametrize(
    ("sigma", "n0", "words"),
    [
        (0.0, 1, "sigma must be above 0"),
        (math.nan, 1, "sigma"),
        (25.0, 1, r"at most 10 \(l2, pixels in \[0, 1\]\)"),
        (0.1, 0, "between 1 and"),
    ],
)
def test_wrong_noise_is_refused(sigma: float, n0: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        smooth(Circle(), sigma, n0)


class TestAbstainingPrediction:
    """Classes at 0 and 90 degrees: the smoothed rule changes at z = pi / 4."""

    @staticmethod
    def classifier() -> SmoothedClassifier:
        return SmoothedClassifier(zero_shot(smooth(Circle(), 0.5), ["0", "90"], ["{}"], cache=False))

    def test_names_the_class_away_from_the_boundary(self) -> None:
        torch.manual_seed(0)
        assert self.classifier().predict(torch.cat([image_at(0.0), image_at(1.5)]), 200) == [0, 1]

    def test_abstains_on_the_boundary_but_for_alpha0(self) -> None:
        torch.manual_seed(0)
        answers = self.classifier().predict(image_at(math.pi / 4).expand(600, -1, -1, -1), 60, 0.05)
        assert sum(answer is not None for answer in answers) <= 600 * 0.05

    def test_no_other_class_inside_a_certificate(self) -> None:
        torch.manual_seed(0)
        # The true radius of class 0 at the origin is pi / 4: inside it, answers are class 0 or none (but for alpha0).
        answers = self.classifier().predict(image_at(0.6 * math.pi / 4).expand(200, -1, -1, -1), 400, 0.01)
        assert answers.count(1) <= 2
        assert answers.count(0) > 0

    def test_needs_an_encoder(self) -> None:
        with pytest.raises(
            UserError, match="only an encoder can be smoothed, by its mean feature, and a Linear is none"
        ):
            smooth(torch.nn.Linear(2, 2), 0.25)  # type: ignore[arg-type]

    def test_needs_a_smoothed_model(self) -> None:
        with pytest.raises(UserError, match="not smoothed"):
            SmoothedClassifier(zero_shot(Circle(), ["0", "90"], ["{}"], cache=False))

"""Certification's rules for the composed model: one image at a time, noise first, one function throughout."""

from __future__ import annotations

import math

import pytest
import torch
from analytic_encoders import Circle, image_at
from torch import Tensor, nn

from robustvlm.certify import FeatureRadius, Job, SamplingEngine
from robustvlm.certify.threats import read_noise
from robustvlm.commands.certify.encoder import NoisyEncoder, behind, find_dependence, probe_encoder
from robustvlm.defenses import SmoothedVLM, smooth
from robustvlm.defenses.purify import PurifiedVLM
from robustvlm.defenses.purify.denoiser import OwnDenoiser
from robustvlm.defenses.purify.parts import Mapper, MapperShape
from robustvlm.defenses.purify.unet import Purifier, PurifierShape
from robustvlm.defenses.zoo.base import PixelDefence, read_defence
from robustvlm.errors import UserError
from robustvlm.models import VLM

SIGMA = 0.25


class Pictures(VLM):
    """A convolutional encoder of 16-pixel images that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(spec="pictures", image_size=16, logit_scale=10.0)
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 6, 4, stride=4)
        self.seen: list[Tensor] = []

    def _image_features(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.detach())
        return torch.tanh(self.layer(pixels)).mean((2, 3))

    def _text_features(self, texts: list[str]) -> Tensor:
        return torch.eye(6)[: len(texts)]


def composed(denoiser: object | None = None, mapper: nn.Module | None = None) -> PurifiedVLM:
    """An encoder between a purifier and a mapper with random weights, or a faulty part in the place of one."""
    torch.manual_seed(1)
    purifier, own = Purifier(PurifierShape(widths=(8, 16), embedding=8)), Mapper(MapperShape(6, embedding=8))
    for parameter in [*purifier.parameters(), *own.parameters()]:
        nn.init.normal_(parameter, std=0.2)
    first = purifier if denoiser is None else OwnDenoiser(denoiser, spec="planted")
    return PurifiedVLM(Pictures(), first, own if mapper is None else mapper)  # type: ignore[arg-type]


def images(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def probe(vlm: VLM, lanes: int = 8) -> list[str]:
    found = probe_encoder(NoisyEncoder(vlm.at_noise(SIGMA)), images(), read_noise(str(SIGMA)), lanes, model="composed")
    return [check.name for check in found.checks]


def test_the_composed_model_is_a_deterministic_function_of_one_image() -> None:
    assert probe(composed()) == []
    encoder, x = NoisyEncoder(composed().at_noise(SIGMA)), images(6)
    assert torch.equal(encoder(x), encoder(x))
    alone = torch.cat([encoder(x[i : i + 1]) for i in range(6)])
    assert torch.allclose(alone, encoder(x), atol=1e-5)


class BatchNormed(nn.Module):
    """A denoiser with batch statistics."""

    def forward(self, noisy: Tensor, _: float) -> Tensor:
        return noisy - noisy.mean(dim=0, keepdim=True)


def reseeded(noisy: Tensor, _: float) -> Tensor:
    """Randomness that is not fresh: the same draws in every call, another for every place in the batch."""
    return noisy + 0.5 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))


def fresh(noisy: Tensor, _: float) -> Tensor:
    """Randomness as it is allowed: fresh for every image of every call, of a law that does not depend on the image."""
    return noisy + 0.5 * torch.randn_like(noisy)


class Whitened(Mapper):
    """A mapper with batch statistics."""

    def forward(self, features: Tensor, _: Tensor | float) -> Tensor:
        return features - features.mean(dim=0)


@pytest.mark.parametrize("denoiser", [BatchNormed(), reseeded])
def test_a_purifier_that_looks_at_other_images_is_refused(denoiser: object) -> None:
    with pytest.raises(UserError, match="depending on the others in its batch"):
        probe(composed(denoiser))


def test_a_mapper_that_looks_at_other_images_is_refused() -> None:
    with pytest.raises(UserError, match="depending on the others in its batch"):
        probe(composed(mapper=Whitened(MapperShape(6))))


def test_a_purifier_with_randomness_of_its_own_is_named() -> None:
    assert probe(composed(fresh)) == ["random encoder"]


def test_a_purifier_that_seeds_its_draws_by_the_pixels_is_no_shared_draw() -> None:
    """As test-time defences do, so that an image's draws depend on no neighbour: noisy copies are never alike."""
    padding = read_defence("randpad", ())
    assert isinstance(padding, PixelDefence)

    def padded(noisy: Tensor, _: float) -> Tensor:
        return padding.move(noisy, None, "through")  # type: ignore[arg-type]

    torch.manual_seed(0)
    assert probe(composed(padded), lanes=16) == ["random encoder"]


def shared(noisy: Tensor, _: float) -> Tensor:
    """One draw for a whole call: its rows depend on each other."""
    return noisy + 0.5 * torch.randn(1, *noisy.shape[1:])


def shared_and_fresh(noisy: Tensor, _: float) -> Tensor:
    return noisy + 0.5 * torch.randn(1, *noisy.shape[1:]) + 0.3 * torch.randn_like(noisy)


def shared_strength(noisy: Tensor, _: float) -> Tensor:
    """Fresh noise whose strength is drawn once for a call: uncorrelated rows that depend on each other all the same."""
    return noisy + (2.0 if torch.rand(()) > 0.5 else 0.1) * torch.randn_like(noisy)


def opposed(noisy: Tensor, _: float) -> Tensor:
    """Pairs of opposed draws."""
    half = 0.5 * torch.randn(len(noisy) // 2, *noisy.shape[1:])
    return noisy + torch.cat([half, -half])


def hidden_statistics(noisy: Tensor, _: float) -> Tensor:
    """Batch statistics under fresh noise."""
    return noisy - noisy.mean(dim=0) + 0.2 * torch.randn_like(noisy)


def hidden_seed(noisy: Tensor, _: float) -> Tensor:
    """A fixed draw for every place in the batch, under fresh noise."""
    return reseeded(noisy, 0.0) + 0.2 * torch.randn_like(noisy)


@pytest.mark.parametrize(
    ("denoiser", "words"),
    [
        (shared, "one draw for the whole call"),
        (shared_and_fresh, "one draw for the whole call"),
        (shared_strength, "one draw for the whole call"),
        (opposed, "opposed pairs"),
        (hidden_statistics, "depending on the others in its batch"),
        (hidden_seed, "depending on its place"),
    ],
)
def test_random_draws_that_depend_on_each_other_are_refused(denoiser: object, words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=words) as caught:
        probe(composed(denoiser), lanes=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lanes", [2, 3])
def test_shared_draws_are_seen_in_small_batches(lanes: int) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="one draw for the whole call"):
        probe(composed(shared), lanes=lanes)
    assert probe(composed(fresh), lanes=lanes) == ["random encoder"]


def test_one_row_a_call_can_be_random_in_any_way() -> None:
    assert probe(composed(shared), lanes=1) == ["random encoder"]


def test_the_test_of_draws_costs_few_passes_and_spares_sound_encoders() -> None:
    torch.manual_seed(0)
    x, passes = images(12), 0

    def encode(noisy: Tensor) -> Tensor:
        nonlocal passes
        passes += len(noisy)
        return noisy.flatten(1)[:, :4] * torch.rand(len(noisy), 1)

    suspected = 0
    for _ in range(100):
        before = passes
        assert find_dependence(encode, x) is None
        suspected += passes - before > 192
    assert passes < 200 * 105
    assert suspected <= 4  # a round suspects with probability 0.006 at most


@pytest.mark.parametrize("threat", ["brightness", "l1"])
def test_noise_that_a_purifier_does_not_know_is_refused(threat: str) -> None:
    """Left at noise 0 it would be the encoder itself, without a word."""
    model = composed(reseeded)
    for made in (lambda: SmoothedVLM(model, 0.1, 4, threat=threat), lambda: behind(model, read_noise(f"{threat}=0.1"))):
        with pytest.raises(UserError, match=f"switched off behind noise against {threat}"):
            made()
    assert isinstance(behind(model, read_noise("0.1")), PurifiedVLM)
    assert SmoothedVLM(model, 0.1, 4).base.fingerprint == behind(model, read_noise("0.1")).fingerprint


def test_noise_is_float32_and_after_the_resize() -> None:
    seen: list[Tensor] = []

    def watch(noisy: Tensor, _: float) -> Tensor:
        seen.append(noisy)
        return noisy

    vlm = composed(watch)
    smoothed = SmoothedVLM(vlm, 0.01, 100)
    with torch.no_grad():
        smoothed.encode_image(torch.full((1, 3, 32, 32), 0.5))
        smoothed.encode_image(torch.full((1, 3, 16, 16), 0.5, dtype=torch.bfloat16))
    noisy = torch.cat(seen)
    assert len(noisy) == 200
    assert noisy.dtype == torch.float32
    assert noisy.shape[-1] == vlm.image_size
    assert len(noisy.unique()) > 5000  # bfloat16 has a few dozen values there
    assert (noisy - 0.5).std().item() == pytest.approx(0.01, rel=0.05)
    assert (noisy - 0.5).abs().max() > 0.03  # not clipped


def test_certification_and_deployment_run_the_same_function() -> None:
    vlm, x = composed(), images(6) + SIGMA * torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    deployed = smooth(vlm, SIGMA).encode_noisy(x)
    for certified in (NoisyEncoder(vlm.at_noise(SIGMA)), NoisyEncoder(smooth(vlm, SIGMA))):
        assert torch.equal(certified(x), deployed)
    told_otherwise = NoisyEncoder(vlm.at_noise(2 * SIGMA))
    assert not torch.allclose(told_otherwise(x), deployed, atol=1e-2)
    assert told_otherwise.fingerprint != NoisyEncoder(vlm.at_noise(SIGMA)).fingerprint
    assert not torch.allclose(NoisyEncoder(vlm)(x), deployed, atol=1e-2)  # an encoder that was told of no noise


class Sharp(Mapper):
    """Far from linear: whether it comes before or after the mean makes a difference."""

    def forward(self, features: Tensor, _: Tensor | float) -> Tensor:
        return (50 * (features + 0.36)).tanh()


def test_all_of_it_is_inside_the_expectation() -> None:
    vlm, unit = composed(mapper=Sharp(MapperShape(6))).at_noise(SIGMA), nn.functional.normalize
    assert isinstance(vlm.purifier, Purifier)
    assert vlm.mapper is not None
    with torch.no_grad():
        torch.manual_seed(0)
        mean = smooth(vlm, SIGMA).mean_feature(images(1), 60)[0]
        torch.manual_seed(0)
        rows = images(1) + SIGMA * torch.randn(60, 3, 16, 16)
        features = vlm.base.encode_image(vlm.purifier(rows, SIGMA))
        assert torch.allclose(mean, unit(vlm.mapper(features, SIGMA), dim=1).mean(dim=0), atol=1e-5)
        assert not torch.allclose(unit(mean, dim=0), unit(vlm.mapper(features.mean(0), SIGMA), dim=0), atol=0.01)


def test_gradients_flow_from_the_smoothed_feature_to_the_pixels() -> None:
    x = images(2).requires_grad_()
    torch.manual_seed(0)
    loss = smooth(composed(), SIGMA, 4).encode_image(x)[:, 0].sum()
    (gradient,) = torch.autograd.grad(loss, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    step = 1e-3

    def at(moved: Tensor) -> float:
        torch.manual_seed(0)  # the same noise
        with torch.no_grad():
            return smooth(composed(), SIGMA, 4).double().encode_image(moved.double())[:, 0].sum().item()

    torch.manual_seed(0)
    slope = (at(x.detach() + step * direction) - at(x.detach() - step * direction)) / (2 * step)
    torch.manual_seed(0)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(smooth(composed(), SIGMA, 4).double().encode_image(wide)[:, 0].sum(), wide)
    assert (exact * direction).sum().item() == pytest.approx(slope, rel=0.02)
    assert gradient.abs().max() > 0


def test_certificates_of_a_composed_model_with_a_closed_form_hold() -> None:
    # The purifier shrinks, so the smoothed feature turns by k / (1 + sigma^2) * eps for a shift of eps: the certified
    # cosine must not be above that of the truth, at any radius, for any image.
    k, shrink = 3.0, 1 + SIGMA**2
    vlm = PurifiedVLM(Circle(k), OwnDenoiser(lambda noisy, sigma: noisy / (1 + sigma**2), spec="shrink"), None)
    engine = SamplingEngine(NoisyEncoder(vlm.at_noise(SIGMA)), seed=0, lanes=128)
    jobs = [Job(str(i), i, image_at(0.1 * i)[0]) for i in range(24)]
    cos0, alpha = 0.8, 0.05

    def certifier(_: Job) -> FeatureRadius:
        return FeatureRadius(cos0=cos0, sigma=SIGMA, alpha=alpha, n=256, n_pilot=64, baselines=False)

    found = [sampled.finding for sampled in engine.run(jobs, certifier)]
    norm = math.exp(-((k / shrink * SIGMA) ** 2) / 2)
    assert sum(finding.r > norm for finding in found) <= 24 * alpha + 3  # type: ignore[operator]
    truth = math.acos(cos0) / (k / shrink)
    assert all(0 < finding.radius < truth for finding in found)
    unpurified = SamplingEngine(NoisyEncoder(Circle(k)), seed=0, lanes=128)
    plain = [sampled.finding.radius for sampled in unpurified.run(jobs, certifier)]
    assert sum(finding.radius for finding in found) > sum(plain)


def test_the_sampling_engine_gives_the_same_answer_in_any_company() -> None:
    def certify(count: int, lanes: int) -> dict[str, float]:
        encoder = NoisyEncoder(composed().at_noise(SIGMA))
        engine = SamplingEngine(encoder, seed=0, lanes=lanes)
        jobs = [Job(str(i), i, images(5)[i]) for i in range(count)]
        found = engine.run(
            jobs, lambda _: FeatureRadius(cos0=0.5, sigma=SIGMA, alpha=0.01, n=128, n_pilot=32, baselines=False)
        )
        return {sampled.job.image_id: sampled.finding.radius for sampled in found}

    alone, among = certify(2, 32), certify(5, 96)
    assert {name: among[name] for name in alone} == pytest.approx(alone, rel=1e-4)

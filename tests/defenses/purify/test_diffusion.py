"""One-step denoising with a diffusion model whose best denoiser is known: Gaussian images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from robustvlm.defenses.purify import OneStepDenoiser
from robustvlm.errors import UserError

# The linear schedule of DDPM (Ho et al. 2020): beta from 1e-4 to 0.02 in 1000 steps.
ALPHAS = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
CENTRE, SPREAD = 0.2, 0.6  # of the images, in [-1, 1]


def posterior(noisy: Tensor, sigma: float) -> Tensor:
    """The best estimate of pixels in [0, 1], for independent pixels N(CENTRE, SPREAD^2) in [-1, 1]."""
    seen, level = 2 * noisy - 1, 2 * sigma
    clean = CENTRE + SPREAD**2 / (SPREAD**2 + level**2) * (seen - CENTRE)
    return (clean + 1) / 2


def predictor(kind: str, scale: float = 1.0):  # type: ignore[no-untyped-def]
    """The best prediction of that kind at x_t, whatever its own conventions make of it."""

    def predict(x: Tensor, time: Tensor) -> Tensor:
        a = ALPHAS[time].view(-1, 1, 1, 1)
        variance = a * SPREAD**2 + 1 - a
        away = scale * x - a.sqrt() * CENTRE
        noise = (1 - a).sqrt() * away / variance
        clean = CENTRE + a.sqrt() * SPREAD**2 * away / variance
        return {"epsilon": noise, "sample": clean, "v": a.sqrt() * noise - (1 - a).sqrt() * clean}[kind]

    return predict


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("sigma", [0.05, 0.12, 0.25, 0.5, 1.0])
def test_a_perfect_model_gives_the_posterior_mean(kind: str, sigma: float) -> None:
    denoiser = OneStepDenoiser(predictor(kind), ALPHAS, prediction=kind)
    noisy = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The schedule is discrete: its nearest level is within half a percent of sigma.
    assert torch.allclose(denoiser(noisy, sigma), posterior(noisy, sigma), atol=5e-3)


def test_an_unscaled_input_would_be_noticed() -> None:
    noisy = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = 0.5
    unscaled = OneStepDenoiser(predictor("sample", 1 / math.sqrt(1 / (1 + 4 * sigma**2))), ALPHAS, prediction="sample")
    assert (unscaled(noisy, sigma) - posterior(noisy, sigma)).abs().max() > 0.02


def test_the_model_sees_the_noise_level_of_its_time() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x, time))
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 1e6)], dim=1)  # a learnt variance, not looked at

    pixels = torch.full((2, 3, 40, 40), 0.5)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    estimate = OneStepDenoiser(watch, ALPHAS)(pixels + 0.25 * noise, 0.25)
    x, time = seen[0]
    assert x.std().item() == pytest.approx(math.sqrt(1 - ALPHAS[int(time[0])]), rel=0.03)
    assert time.dtype == torch.int64
    assert estimate.abs().max() < 10


def test_times_grow_with_noise_and_meet_their_levels() -> None:
    denoiser = OneStepDenoiser(predictor("epsilon"), ALPHAS)
    levels = [0.02, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0]
    times = [denoiser.time(sigma) for sigma in levels]
    assert times == sorted(set(times))
    assert [denoiser.noise_level(time) for time in times] == pytest.approx(levels, rel=0.03)


@pytest.mark.parametrize(
    ("alphas", "prediction", "words"),
    [
        (ALPHAS, "noise", "known: 'epsilon', 'sample', 'v'"),
        (ALPHAS.flip(0), "epsilon", "must decrease"),
        (torch.tensor([1.0, 0.5]), "epsilon", "from below 1"),
        (torch.ones(2, 2), "epsilon", "must decrease"),
    ],
)
def test_wrong_schedules_are_refused(alphas: Tensor, prediction: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        OneStepDenoiser(predictor("epsilon"), alphas, prediction=prediction)


@dataclass(frozen=True)
class Answer:
    sample: Tensor


@pytest.mark.parametrize("wrap", [Answer, lambda said: (said,)])
def test_answers_as_those_of_diffusers_are_understood(wrap: Callable[[Tensor], object]) -> None:
    plain = predictor("epsilon")
    noisy = torch.rand(2, 3, 4, 4)
    wrapped = OneStepDenoiser(lambda x, time: wrap(plain(x, time)), ALPHAS)
    assert torch.equal(wrapped(noisy, 0.25), OneStepDenoiser(plain, ALPHAS)(noisy, 0.25))


@pytest.mark.parametrize(
    ("answer", "words"),
    [({"x": 1}, "got a dict"), (torch.zeros(2, 1, 4, 4), r"got \[2, 1, 4, 4\]"), ((), "got a tuple")],
)
def test_answers_that_are_no_prediction_are_refused(answer: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        OneStepDenoiser(lambda *_: answer, ALPHAS)(torch.rand(2, 3, 4, 4), 0.25)
    with pytest.raises(UserError, match="cannot be"):
        OneStepDenoiser(None, ALPHAS)  # type: ignore[arg-type]

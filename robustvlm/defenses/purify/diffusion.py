"""A diffusion model as a denoiser: one step at the time whose noise level is sigma."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError, nearest

PREDICTIONS = ("epsilon", "sample", "v")


class OneStepDenoiser(nn.Module):
    """One-step denoising with a diffusion model trained on pixels in [-1, 1].

    In those pixels noise of sigma is noise of 2 sigma. The model's input at time t is sqrt(a_t) x0 + sqrt(1 - a_t)
    noise (a_t: cumulative product of 1 - beta), so the time is the one with (1 - a_t) / a_t = (2 sigma)^2 (the nearest
    of the schedule in log noise level), and the noisy image is scaled by sqrt(a_t) (Carlini et al. 2022, arXiv
    2206.10550, section 3). The estimate of x0 follows from what the model predicts:

    * "epsilon": x0 = (x_t - sqrt(1 - a_t) e) / sqrt(a_t);
    * "v": x0 = sqrt(a_t) x_t - sqrt(1 - a_t) v;
    * "sample": x0 itself.

    Deterministic, differentiable, and not clipped.

    Args:
        model: called with x_t [B, 3, H, W] and times [B] (int64); returns the prediction [B, C >= 3, H, W], of which
            the first three channels are used (models that learn their variance return six). An answer that holds it
            as its attribute `sample`, or first in a tuple, as those of diffusers do, is understood.
        alphas_cumprod: a_t for t = 0, 1, ..., decreasing.
        prediction: what the model predicts.

    Raises:
        UserError: a schedule that does not decrease within (0, 1), an unknown prediction, or a model that cannot be
            called.

    Example:
        >>> alphas = torch.linspace(0.9999, 0.01, 1000)
        >>> denoiser = OneStepDenoiser(lambda x, t: torch.zeros_like(x), alphas)
        >>> pixels = torch.rand(2, 3, 4, 4)
        >>> torch.allclose(denoiser(pixels, 0.25), pixels, atol=1e-6)  # no noise predicted, none taken away
        True
        >>> round(denoiser.noise_level(denoiser.time(0.25)), 2)
        0.25
    """

    alphas: Tensor

    def __init__(
        self, model: Callable[[Tensor, Tensor], Any], alphas_cumprod: Tensor, *, prediction: str = "epsilon"
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise UserError(f"a diffusion model predicts one of these: {nearest(prediction, PREDICTIONS)}")
        if not callable(model):
            raise UserError(f"a diffusion model is called with pixels and times: a {type(model).__name__} cannot be")
        alphas = alphas_cumprod.detach().double().cpu()
        if alphas.ndim != 1 or not ((alphas > 0) & (alphas < 1)).all() or not (alphas.diff() < 0).all():
            raise UserError("alphas_cumprod must decrease from below 1 to above 0, one value for each time step")
        self.model, self.prediction = model, prediction
        self.register_buffer("alphas", alphas, persistent=False)

    def time(self, sigma: float) -> int:
        """Return the time step whose noise level is nearest to `sigma` (pixels in [0, 1])."""
        levels = ((1 - self.alphas) / self.alphas).sqrt() / 2
        return int((levels.log() - math.log(max(sigma, 1e-12))).abs().argmin())

    def noise_level(self, time: int) -> float:
        """Return the noise level, in pixels in [0, 1], of a time step."""
        alpha = float(self.alphas[time])
        return math.sqrt((1 - alpha) / alpha) / 2

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        """Return the estimate of the clean pixels."""
        time = self.time(sigma)
        alpha = float(self.alphas[time])
        scaled = math.sqrt(alpha) * (2 * noisy - 1)
        times = torch.full((len(noisy),), time, dtype=torch.int64, device=noisy.device)
        said = _tensor(self.model(scaled, times))[:, :3]
        if self.prediction == "sample":
            clean = said
        elif self.prediction == "v":
            clean = math.sqrt(alpha) * scaled - math.sqrt(1 - alpha) * said
        else:
            clean = (scaled - math.sqrt(1 - alpha) * said) / math.sqrt(alpha)
        return (clean + 1) / 2


def _tensor(answer: Any) -> Tensor:
    """Return the prediction that a model's answer is or holds."""
    held = answer if isinstance(answer, Tensor) else getattr(answer, "sample", None)
    held = answer[0] if held is None and isinstance(answer, tuple) and answer else held
    if not isinstance(held, Tensor) or held.ndim != 4 or held.shape[1] < 3:
        came = f"{list(held.shape)}" if isinstance(held, Tensor) else f"a {type(answer).__name__}"
        raise UserError(f"a diffusion model must return its prediction [B, 3 or more, H, W], got {came}")
    return held

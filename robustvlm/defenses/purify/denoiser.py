"""The user's own denoiser in the purifier's place: a function of pixels and sigma, or one step of a diffusion model."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustvlm.core.boundary import own_copy, same_process
from robustvlm.core.framing import trial_pixels
from robustvlm.core.object_graph import Reached, fingerprint
from robustvlm.core.registry import create, names_a_callable
from robustvlm.core.size import Size
from robustvlm.core.user_code import file_digest
from robustvlm.errors import UserError, nearest
from robustvlm.models.weights import brief

# Denoisers in place of the trained purifier: a small protocol, and the user's own by `module:callable`

_TRIAL_SIGMA = 0.25


class Denoiser(Protocol):
    """What can stand before an encoder: an estimate of the clean pixels.

    The estimate of one image must not depend on the others of its batch. Randomness is allowed if it is fresh and
    independent for every image of every call and its law does not depend on the image; it then is part of the
    smoothing expectation. One draw for a whole call (a random time step or crop) makes noisy copies depend on each
    other, and certificates count them as independent.
    """

    def __call__(self, noisy: Tensor, sigma: float, /) -> Tensor:
        """Return clean pixels [B, 3, H, W] in [0, 1] of pixels with Gaussian noise of standard deviation `sigma`."""


class OwnDenoiser(nn.Module):
    """A user's denoiser, frozen, its weights, settings and source part of its identity; see `Denoiser`.

    Networks that it holds where torch does not look (a closure, a list, a global) are part of it as well: they are
    frozen, put into evaluation mode and moved with it.

    Example:
        >>> blur = OwnDenoiser(lambda noisy, sigma: noisy.mean((2, 3), keepdim=True).expand_as(noisy), spec="my:blur")
        >>> blur(torch.rand(2, 3, 4, 4), 0.25).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, denoiser: Any, *, spec: str) -> None:
        super().__init__()
        self.denoiser, self.spec = denoiser, spec
        # Found before the first call, which may leave caches and counters in the user's object.
        self._reached = Reached(denoiser)
        self._facts = (spec, file_digest(spec.partition(":")[0]), *self._reached.facts)
        known = set(self.modules())
        self.hidden = nn.ModuleList(module for module in self._reached.modules.values() if module not in known)
        if not isinstance(denoiser, nn.Module):
            # A plain object is no part that `modules()` visits, so its declaration is repeated here.
            self.differentiable = getattr(denoiser, "differentiable", True)
            self.surrogate = getattr(denoiser, "surrogate", None)
        self.eval().requires_grad_(False)

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        """Return the user's estimate, refused where its shape is another."""
        with same_process():
            # A copy, which it may change in place.
            estimate: Tensor = self.denoiser(noisy.clone(), sigma)
        if not isinstance(estimate, Tensor) or estimate.shape != noisy.shape:
            came = list(estimate.shape) if isinstance(estimate, Tensor) else f"a {type(estimate).__name__}"
            raise UserError(f"the denoiser '{self.spec}' must return pixels {list(noisy.shape)}, got {came}")
        return estimate

    @property
    def state(self) -> Mapping[str, object]:
        """The weights that belong to the denoiser's identity."""
        return self._reached.state()

    @property
    def fingerprint(self) -> str:
        """Digest of the weights as they are, and of the settings and sources that it was made with."""
        return fingerprint(self.state, self._facts)


def load_denoiser(spec: str, image_size: Size, device: torch.device) -> OwnDenoiser:
    """Return the denoiser that `module:callable` makes, after a trial on two images of the encoder's size.

    Raises:
        UserError: it is not there, fails, or returns another shape or values that are not finite.
    """
    if not names_a_callable(spec):
        raise UserError(f"a denoiser is named module:callable, got '{spec}': as my_denoiser:make")
    thing = create(spec)
    if not callable(thing):
        raise UserError(f"'{spec}' must return a denoiser, called with pixels and sigma: {type(thing).__name__} cannot")
    if not isinstance(thing, nn.Module) and callable(getattr(thing, "to", None)):
        thing = thing.to(device) or thing
    denoiser = OwnDenoiser(own_copy(thing), spec=spec).to(device)
    pixels = trial_pixels(2, image_size, device=device)
    wanted = f"the denoiser '{spec}' of pixels {list(pixels.shape)} and sigma {_TRIAL_SIGMA} must return finite pixels"
    try:
        with torch.no_grad():
            estimate = denoiser(pixels, _TRIAL_SIGMA)
    except UserError:
        raise
    except Exception as error:  # the user's denoiser may fail in any way
        raise UserError(f"{wanted}, it raised {type(error).__name__}: {brief(error)}") from error
    if not estimate.isfinite().all():
        raise UserError(f"{wanted}, got NaN or infinite values")
    return denoiser


# A diffusion model as a denoiser: one step at the time whose noise level is sigma

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

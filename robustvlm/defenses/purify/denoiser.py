"""Denoisers in place of the trained purifier: a small protocol, and the user's own by `module:callable`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from robustvlm.core.registry import names_a_callable
from robustvlm.core.side_effects import same_process
from robustvlm.core.user_code import file_digest
from robustvlm.errors import UserError
from robustvlm.models.borrowed import own_copy
from robustvlm.models.custom import create
from robustvlm.models.fingerprint import fingerprint
from robustvlm.models.hub import brief
from robustvlm.models.reach import Reached

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


def load_denoiser(spec: str, image_size: int, device: torch.device) -> OwnDenoiser:
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
    pixels = torch.linspace(0, 1, 2 * 3 * image_size**2, device=device).view(2, 3, image_size, image_size)
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

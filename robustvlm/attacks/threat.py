"""Threat models: which perturbations an attacker may add to an image with pixels in [0, 1]."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from robustvlm.core.seeds import row_norms
from robustvlm.errors import BadSetting, UserError, nearest, setting

NORMS = ("Linf", "L2")
DEFAULT_EPS = {"Linf": "2/255", "L2": "0.5"}
"""The radius in each norm where none is asked for."""
_ALIASES = {"linf": "Linf", "inf": "Linf", "l_inf": "Linf", "l∞": "Linf", "l2": "L2", "2": "L2", "l_2": "L2"}
_FRACTION = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*$")

# Half the distance between neighbouring float32 numbers just below 1: how far rounding may move a pixel.
_HALF_ULP = 2.0**-25


@dataclass(frozen=True)
class ThreatModel:
    """All perturbations of norm at most `eps` that keep pixels in [0, 1].

    Args:
        norm: "Linf" or "L2", taken over all pixels and channels of one image.
        eps: radius in pixel units (the scale on which an image lies in [0, 1]).

    Raises:
        UserError: for an unknown norm, or an eps that is not a positive finite number (for Linf: at most 1).

    Example:
        >>> ThreatModel("Linf", 4 / 255)
        ThreatModel(norm='Linf', eps=0.01568...)
    """

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UserError(f"unknown norm '{self.norm}': {nearest(self.norm, NORMS)}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise BadSetting("eps", "must be a positive number", got=f"{self.eps}: pass for example 2/255")
        if self.norm == "Linf" and self.eps > 1:
            raise UserError(
                f"eps {self.eps:g} is larger than the pixel range [0, 1]: "
                f"for {self.eps:g} grey levels pass {self.eps:g}/255"
            )


def parse_norm(text: str) -> str:
    """Return "Linf" or "L2" for the usual spellings.

    Example:
        >>> parse_norm("linf"), parse_norm("L2")
        ('Linf', 'L2')
    """
    norm = _ALIASES.get(text.strip().lower())
    if norm is None:
        raise UserError(f"unknown norm '{text}': expected Linf or L2")
    return norm


def parse_eps(text: str, name: str = "eps") -> list[tuple[str, float]]:
    """Return (text, value) pairs, ascending, for `4/255`, `0.5` or a list `1/255,2/255`; none may stand twice.

    Args:
        name: of the setting, for errors.

    Example:
        >>> parse_eps("2/255, 1/255")
        [('1/255', 0.0039...), ('2/255', 0.0078...)]
    """
    pairs: dict[float, str] = {}
    for part in text.split(","):
        if not part.strip():
            raise UserError(
                f"empty value in {setting(name)} '{text}': expected numbers such as 2/255 separated by commas"
            )
        value = _eps_value(part, name)
        if value in pairs:
            again = f"'{pairs[value]}' again" if pairs[value] == part.strip() else f"the same as '{pairs[value]}'"
            raise UserError(f"{setting(name)} '{part.strip()}' is {again}: name each radius once")
        pairs[value] = part.strip()
    return [(pairs[value], value) for value in sorted(pairs)]


def one_radius(eps: str | float, name: str) -> tuple[str, float]:
    """Return the single radius of a setting as text and number, such as ("1/255", 0.00392...).

    Raises:
        UserError: several radii, or no number.

    Example:
        >>> one_radius("1/4", "eps"), one_radius(0.5, "eps")
        (('1/4', 0.25), ('0.5', 0.5))
    """
    found = parse_eps(eps if isinstance(eps, str) else repr(float(eps)), name)
    if len(found) != 1:
        raise BadSetting(name, "takes one number", got=f"'{eps}'")
    return found[0]


def radius_or_default(eps: str | float | None, norm: str, *, linf: str) -> tuple[str, float]:
    """Return the single radius of a setting as text and number; where none is given, `linf`, or the default in L2.

    Example:
        >>> radius_or_default(None, "Linf", linf="1/255"), radius_or_default(None, "L2", linf="1/255")
        (('1/255', 0.00392...), ('0.5', 0.5))
    """
    return one_radius((DEFAULT_EPS | {"Linf": linf})[norm] if eps is None else eps, "eps")


def _eps_value(text: str, name: str) -> float:
    fraction = _FRACTION.match(text)
    try:
        if fraction:
            value = float(Fraction(fraction.group(1)) / Fraction(fraction.group(2)))
        else:
            value = float(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"{setting(name)} '{text.strip()}' is no number: expected a value such as 2/255 or 0.5"
        ) from None
    if not (math.isfinite(value) and value > 0):
        raise BadSetting(name, "must be a positive number", got=f"'{text.strip()}': pass for example 2/255")
    return value


def pixel_box(x0: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the tightest floats (low, high) of {x : |x - x0| <= eps, 0 <= x <= 1}, exact for the dtype of `x0`.

    A bound that rounding carried past eps is moved back to the next float, so that a clamped image is inside the
    ball in exact arithmetic and not only up to rounding.

    Example:
        >>> low, high = pixel_box(torch.tensor([0.0, 0.5]), 0.25)
        >>> low.tolist(), high.tolist()
        ([0.0, 0.25], [0.25, 0.75])
    """
    exact = x0.double()
    low, high = (exact - eps).clamp(0, 1).to(x0.dtype), (exact + eps).clamp(0, 1).to(x0.dtype)
    # The difference of two floats this close is exact in float64.
    low = torch.where(exact - low.double() > eps, torch.nextafter(low, x0), low)
    high = torch.where(high.double() - exact > eps, torch.nextafter(high, x0), high)
    return low, high


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] values so that they broadcast over the images `like` [B, ...]."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def l2_norms(delta: Tensor) -> Tensor:
    """Return the L2 norm of every image's perturbation, [B, ...] -> [B]."""
    return row_norms(delta)


def lengths(delta: Tensor, norm: str) -> Tensor:
    """Return the Linf or L2 norm of every image's perturbation, [B, ...] -> [B].

    Example:
        >>> lengths(torch.tensor([[3.0, -4.0]]), "L2"), lengths(torch.tensor([[3.0, -4.0]]), "Linf")
        (tensor([5.]), tensor([4.]))
    """
    return delta.flatten(1).abs().amax(1) if norm == "Linf" else l2_norms(delta)


def project(x: Tensor, x0: Tensor, threat: ThreatModel, box: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Project images [B, C, H, W] onto the ball around `x0` and into [0, 1].

    For L2 the ball comes first and the clamp second: as `x0` lies in the box, clamping only shortens the
    perturbation, so the result lies in both. `box` is `pixel_box(x0, eps)` where the caller has it already.

    Example:
        >>> x0 = torch.full((1, 1, 1, 1), 0.5)
        >>> project(x0 + 0.4, x0, ThreatModel("Linf", 0.25)).item()
        0.75
    """
    if threat.norm == "Linf":
        low, high = box if box is not None else pixel_box(x0, threat.eps)
        return torch.minimum(torch.maximum(x, low), high)
    delta = x - x0
    scale = (_safe_l2_radius(threat.eps, x0[0].numel()) / l2_norms(delta).clamp_min(1e-30)).clamp_max(1.0)
    return (x0 + delta * per_image(scale, delta)).clamp(0, 1)


def _safe_l2_radius(eps: float, n_pixels: int) -> float:
    """Return the radius to aim at so that rounding every pixel of the image cannot carry it past eps.

    For 64 x 64 images and eps 0.5 it is smaller by a factor of 8e-6.
    """
    return max(eps * (1 - 2.0**-20) - math.sqrt(n_pixels) * _HALF_ULP, eps / 2)


def random_start(x0: Tensor, threat: ThreatModel, generator: torch.Generator) -> Tensor:
    """Draw a starting point for one image [1, C, H, W]: uniform in the Linf ball, or a random direction of length eps.

    The draw is made on the CPU, so that it is the same on every device.
    """
    shape = x0.shape
    if threat.norm == "Linf":
        noise = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * threat.eps
    else:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        noise = noise * per_image(threat.eps / l2_norms(noise), noise)
    return project(x0 + noise.to(x0), x0, threat)


def perturbation_norms(x: Tensor, x0: Tensor) -> tuple[float, float]:
    """Return (Linf, L2) of one image's perturbation, measured in float64, the same to the bit for any memory layout."""
    delta = (x.double() - x0.double())[None]
    return delta.abs().max().item(), l2_norms(delta).item()

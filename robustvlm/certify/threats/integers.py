"""The threat to 8-bit pixels: images of whole numbers, noise of whole numbers, and no floating point in between.

*Why.* Noise in floating point is not Gaussian about x': x + noise has the low bits of both, so that an encoder can tell
from a noisy copy which image it came from, and certificates of real noise are void against it (Voracek and Hein, ICLR
2023, who smooth quantised images soundly). On a grid there is no such gap: sums of whole numbers are exact.

*Theorem.* Let x and x' be images of whole numbers, N ~ N(0, s^2 I), and h any function of images of whole numbers. As
round(x + N) = x + round(N) for whole x, the copies x + round(N) have the law of round(x + N), and h(round(.)) is one
function of a Gaussian about x, and about x'. So T0 and all that is built on it hold for E h(x + round(N)) exactly as
for Gaussian noise, for the l2 distance of whole numbers.

*In the machine.* round(N) is drawn from 64 random bits by a table of P(round(N) <= k), computed with 40 digits and
rounded to multiples of 2^-64: its law differs from the true one by less than (2 K + 2) 2^-64 a value, K = 10 s, for
which a part of alpha is set aside (`off_law`). The sum of whole numbers is exact in float32, and its division by 255 is
one function of the sum, as is whatever the encoder computes from it, in any arithmetic.
"""

from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustvlm.certify.noise import Kind
from robustvlm.certify.threats.base import Threat
from robustvlm.errors import UserError

LEVELS = 255
_DIGITS = 40
_REACH = 10
"""Noise beyond so many standard deviations has a probability below 2^-75, and is drawn as if at that distance."""
_OFF = 1e-3
"""By how much of a grey level float32 pixels of an 8-bit image may miss a whole number."""


class Integers(Threat):
    """Any change of an 8-bit image to another one, by its Euclidean length; noise N(0, (255 sigma)^2 I), rounded.

    Pixels are rounded to 8 bits first: that is part of the model that is deployed.

    Example:
        >>> pixels = torch.tensor([0.0, 1.0, 0.2]).view(1, 3, 1, 1)
        >>> draws = torch.tensor([0, 2**62, -(2**62)]).view(1, 3, 1, 1)
        >>> (255 * Integers().noisy(pixels, draws, 0.25)).flatten().tolist()
        [0.0, 298.0, 8.0]
    """

    name, usual, most, of_pixels = "8bit", 0.25, 1.0, True
    kind: ClassVar[Kind] = "bits"
    allows = (
        "is an image of 8 bits (whole numbers from 0 to 255) at an l2 distance below the radius, pixels divided by 255"
    )
    unit, short, exact = "l2 between 8-bit images, pixels divided by 255", "L₂, 8 bits", True
    law = (
        "Whole grey levels: Gaussian with standard deviation {sigma} times 255, rounded, added to the image of whole "
        "numbers after the resize and before the model's own normalisation, not clipped"
    )

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        table = steps_of(sigma).to(draws.device)
        whole = torch.searchsorted(table, draws.contiguous(), right=True) - len(table) // 2
        found: Tensor = _Whole.apply(rows, whole)
        return found

    def check_pixels(self, pixels: Tensor) -> None:
        levels = pixels.detach().double() * LEVELS
        off = float((levels - levels.round()).abs().max())
        if not (off <= _OFF and float(levels.min()) >= -_OFF and float(levels.max()) <= LEVELS + _OFF):
            raise UserError(
                "the threat 8bit is about images of whole numbers from 0 to 255, divided by 255, and a pixel is off by "
                f"{off:.3g} of a level or out of range: pass 8-bit images, or leave the threat l2"
            )

    def off_law(self, values: int, sigma: float) -> float:
        return values * (len(steps_of(sigma)) + 2) * 2.0**-64


class _Whole(torch.autograd.Function):
    """`(round(255 x) + whole) / 255` in float32, exactly a function of whole numbers; its gradient is taken for one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, whole: Tensor) -> Tensor:
        del ctx
        levels = (rows.detach().double() * LEVELS).round()
        # Whole numbers below 2^24 are exact in float32, wherever and in whatever batch the sum is made.
        return ((levels + whole.double()).float() / LEVELS).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        return grads[0], None


@lru_cache(maxsize=16)
def steps_of(sigma: float) -> Tensor:
    """Return thresholds [2 K] of 64 bits: the noise is how many of them are no larger than a random number, less K.

    Example:
        >>> steps = steps_of(0.01)
        >>> len(steps), bool((steps.diff() >= 0).all())
        (52, True)
    """
    with localcontext() as context:
        context.prec = _DIGITS
        s = Decimal(sigma) * LEVELS
        reach = int(_REACH * s) + 1
        upper = [normal_cdf((Decimal(k) + Decimal("0.5")) / s) for k in range(reach)]
        scale = Decimal(2**64)
        above = [min(int((value * scale).to_integral_value()), 2**64 - 1) - 2**63 for value in upper]
        below = [int(((1 - value) * scale).to_integral_value()) - 2**63 for value in reversed(upper)]
    return torch.tensor(below + above, dtype=torch.int64)


def normal_cdf(z: Decimal) -> Decimal:
    """Return Phi(z) of z >= 0 to the digits of the context, by a series of positive terms.

    Example:
        >>> round(float(normal_cdf(Decimal("1.5"))), 12)
        0.933192798731
    """
    term = total = z
    square, n = z * z, 1
    while term > total * Decimal(10) ** -_DIGITS:
        n += 2
        term = term * square / n
        total += term
    # 1 / sqrt(2 pi) with 45 digits.
    return Decimal("0.5") + total * (-square / 2).exp() * Decimal("0.398942280401432677939946059934381868475858631")

"""Threats of light: brightness, contrast, both at once, gamma, and the gains of the colour channels.

Each is a move whose parameters add up exactly, so that Gaussian noise on the parameters certifies as it does on pixels.
Contrast is stretched about the image's own mean, which brightness shifts and contrast leaves alone; that is why the two
commute, and why their joint radius costs nothing (about zero, as in Li et al., CCS 2021, they do not, and the noise of
one changes the scale of the other's). Nothing is clipped, neither by the attacker nor by the noise.
"""

import torch
from torch import Tensor

from robustvlm.certify.threats.base import Move, spread
from robustvlm.errors import UserError


class Brightness(Move):
    """x' = x + b.

    Example:
        >>> Brightness().move(torch.zeros(1, 3, 2, 2), torch.tensor([[0.25]])).unique().item()
        0.25
    """

    name, moves, usual, most = "brightness", 1, 0.2, 10.0
    allows = "is the image with one number b added to every pixel, |b| below the radius, and not clipped"
    unit = "brightness: what is added to every pixel, pixels in [0, 1]"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        return rows + spread(by[:, 0], rows)


class Contrast(Move):
    """x' = mean(x) + e^k (x - mean(x)), the mean over all pixels and channels.

    Example:
        >>> Contrast().move(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[0.6931472]])).flatten().tolist()
        [-0.5, 1.5]
    """

    name, moves, usual, most = "contrast", 1, 0.3, 10.0
    allows = (
        "is the image with its contrast about its own mean multiplied by e^k, |k| below the radius (the factor between "
        "e^-radius and e^radius), and not clipped"
    )
    unit = "contrast: natural logarithm of the factor"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        mean = rows.mean(dim=(1, 2, 3), keepdim=True)
        return mean + spread(by[:, 0], rows).exp() * (rows - mean)


class Light(Move):
    """x' = mean(x) + b + e^k (x - mean(x)): brightness and contrast at once, the radius their Euclidean length.

    Example:
        >>> Light().move(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[0.25, 0.6931472]])).flatten().tolist()
        [-0.25, 1.75]
    """

    name, moves, usual, most = "light", 2, 0.2, 10.0
    allows = (
        "is the image with its contrast about its own mean multiplied by e^k and b added to every pixel, the root of "
        "b^2 + k^2 below the radius, and not clipped"
    )
    unit = "light: root of b^2 + k^2, b what is added to pixels in [0, 1], k the logarithm of the contrast"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        return Brightness().move(Contrast().move(rows, by[:, 1:]), by[:, :1])


class Gamma(Move):
    """x' = x^(e^k), pixel by pixel: gamma correction, which stays within [0, 1].

    Example:
        >>> Gamma().move(torch.tensor([[[[0.0, 0.5, 1.0]]]]), torch.tensor([[0.6931472]])).flatten().tolist()
        [0.0, 0.25, 1.0]
    """

    name, moves, usual, most = "gamma", 1, 0.4, 3.0
    allows = "is the image with every pixel in [0, 1] raised to the power e^k, |k| below the radius (gamma correction)"
    unit = "gamma: natural logarithm of the exponent"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        lit = rows > 0.0  # black stays black, and has no slope
        power = torch.where(lit, rows, torch.ones_like(rows)) ** spread(by[:, 0], rows).exp()
        return torch.where(lit, power, torch.zeros_like(rows))


class Colour(Move):
    """x'_c = e^(k_c) x_c for red, green and blue: another light, or a white balance.

    Example:
        >>> Colour().move(torch.ones(1, 3, 1, 1), torch.tensor([[0.6931472, 0.0, 0.0]])).flatten().tolist()
        [2.0, 1.0, 1.0]
    """

    name, moves, usual, most = "colour", 3, 0.2, 10.0
    allows = (
        "is the image with red, green and blue multiplied by e^r, e^g and e^b, the root of r^2 + g^2 + b^2 below the "
        "radius, and not clipped"
    )
    unit = "colour: Euclidean length of the logarithms of the three gains"

    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        if rows.shape[1] != self.moves:  # one channel would be broadcast to three
            raise UserError(f"the threat colour is about images of 3 channels, got {rows.shape[1]}: pass RGB images")
        return rows * by.to(rows.dtype).exp()[:, :, None, None]

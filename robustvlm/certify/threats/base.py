"""What a threat is: what an attacker may do to an image, and the noise that certifies a radius against it.

A threat moves an image along parameters, x' = move(x, theta), and the noise moves it on along random ones. If moves add
up, move(move(x, theta), tau) = move(x, theta + tau), the noisy copies of x' are those of x with the law of the noise
shifted by theta. For Gaussian noise the shift theorem (T0) then holds word for word with |theta| in place of the l2
distance, and with it every bound that is built on it: radii are lengths of theta (Li et al., CCS 2021, "resolvable"
transformations; here without any further loss, since the moves commute).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.noise import Kind
from robustvlm.certify.normal import Array, check_sigma, shift_down, shift_up
from robustvlm.core import PLAIN
from robustvlm.errors import UserError, setting
from robustvlm.text import format_exact


class Threat(ABC):
    """What an attacker may do to an image, measured by one number, and the noise against it.

    Attributes:
        name: as `--threat` and `+smooth:NAME=SIGMA` take it.
        allows: what the attacker does, as the end of "every image that ...".
        unit: what a radius is measured in, and sigma unless `noise_unit` says otherwise; short: the same in a word.
        law: how the noise comes about, in words; `{sigma}` stands for its level.
        usual: noise level where none is said. most: the largest that makes sense.
        kind: what a copy's noise is made of.
        gaussian: T0 holds for the noise, and with it every claim; else only what `least` and `reach` say of a share.
        of_pixels: every pixel has noise of its own, of standard deviation sigma, in [0, 1] pixels: what a purifier may
            be told.
        moves: how many parameters an attacker has; 0: every pixel is one.
        bumpy: what a move does may rise and fall between those of a coarse grid.
        smoothed_by: name of the threat whose noise the deployed model has: its own, unless there is no noise for it.
        exact: no rounding of noise or sum stands between certificate and machine.
    """

    name: str
    allows: str
    unit: str
    short: str
    law: str
    exact: ClassVar[bool] = False
    usual: float
    most: float
    kind: ClassVar[Kind] = "normal"
    gaussian: ClassVar[bool] = True
    of_pixels: ClassVar[bool] = False
    moves: ClassVar[int] = 0
    bumpy: ClassVar[bool] = False

    @property
    def smoothed_by(self) -> str:
        return self.name

    @property
    def noise_unit(self) -> str:
        """What sigma is measured in: the unit of the threat, unless another one's noise is what certifies it."""
        return self.unit

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def draws(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one copy's noise, for an image of shape [C, H, W]."""
        return tuple(pixels)

    @abstractmethod
    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        """Return noisy copies [R, C, H, W] of images [R, C, H, W], differentiable in them.

        Args:
            draws: what the noise is made of, [R, *draws(shape)], of `kind`. sigma: its standard deviation.
        """

    def check_pixels(self, pixels: Tensor) -> None:
        """Refuse images that the threat is not about."""
        del pixels

    def half_axes(self, shape: Sequence[int]) -> tuple[float, float] | None:
        """Return the least and largest half-axis of what lies within radius one, of images [C, H, W]; None: one length
        counts in all directions, or no length of pixels does.
        """
        del shape
        return None

    def reach(self, p: float, share: float, sigma: float) -> float:
        """Return the distance within which a share of copies that is at least `p` here stays above `share`; 0: none."""
        from robustvlm.certify.feature import fcsb_radius

        if not share < 1.0:  # nothing stays above a certain event's share
            return 0.0
        return float(fcsb_radius(p, 2.0 * share - 1.0, sigma))

    def least(self, p: float, eps: float, sigma: float) -> float:
        """Return the least that a share of `p` can become at the distance `eps`."""
        return float(shift_down(p, eps / sigma))

    def needed(self, share: float, eps: float, sigma: float) -> float:
        """Return the share from which at most `share` can be left at the distance `eps`; 1 and more: there is none."""
        return float(shift_up(share, eps / sigma))

    def off_law(self, values: int, sigma: float) -> float:
        """Return how far the law of one copy's noise, of so many values, may be from the stated one (total variation).

        Floating-point noise is taken as it is ("up to floating point") and counts as 0.
        """
        del values, sigma
        return 0.0


class Moving(Threat):
    """A threat with few parameters, all of which an audit can try."""

    @abstractmethod
    def move(self, rows: Tensor, by: Tensor) -> Tensor:
        """Return images [R, C, H, W] moved by parameters [R, moves]."""

    @abstractmethod
    def inside(self, radius: float, steps: int) -> Array:
        """Return parameters [N, moves] of length at most `radius`: what an audit tries, about `steps` of them."""


class Move(Moving):
    """Moves that are the same for attacker and noise, and add up."""

    law = (
        "The same change with parameters drawn from a Gaussian with standard deviation {sigma}, made in float32 after "
        "the resize and before the model's own normalisation, not clipped"
    )

    @property
    def short(self) -> str:  # type: ignore[override]
        return self.name

    def draws(self, pixels: Sequence[int]) -> tuple[int, ...]:
        del pixels
        return (self.moves,)

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        return self.move(rows, draws.to(rows.dtype) * sigma)

    def inside(self, radius: float, steps: int) -> Array:
        return in_ball(self.moves, radius, steps)


def in_ball(dimensions: int, radius: float, count: int) -> Array:
    """Return about `count` points [N, dimensions] of the ball: three fifths on its surface, others on shells within.

    Example:
        >>> in_ball(1, 2.0, 4).ravel().tolist()
        [-2.0, -1.0, 1.0, 2.0]
        >>> bool(np.linalg.norm(in_ball(3, 0.5, 100), axis=1).max() <= 0.5 + 1e-12)
        True
    """
    if dimensions == 1:
        parts = radius * np.arange(1, max(1, count // 2) + 1) / max(1, count // 2)
        return np.concatenate([-parts[::-1], parts])[:, None]
    outer = max(2 * dimensions, round(0.6 * count))
    inner = max(dimensions, (count - outer) // 2)
    shells = ((outer, 1.0), (inner, 0.75), (inner, 0.5))
    return np.concatenate([part * radius * on_sphere(dimensions, size) for size, part in shells])


def on_sphere(dimensions: int, count: int) -> Array:
    """Return `count` unit vectors: even on a circle, along a Fibonacci spiral on a sphere.

    Example:
        >>> on_sphere(2, 4).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-0.0, -1.0]]
    """
    if dimensions == 2:
        angle = 2.0 * np.pi * np.arange(count) / count
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if dimensions != 3:
        raise ValueError(f"points on spheres of 2 or 3 dimensions, got {dimensions}")
    height = 1.0 - 2.0 * (np.arange(count) + 0.5) / count
    turn = np.pi * (3.0 - math.sqrt(5.0)) * np.arange(count)
    ring = np.sqrt(1.0 - height * height)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1)


def spread(parameters: Tensor, rows: Tensor) -> Tensor:
    """Return one parameter of each row [R] shaped to broadcast against images [R, C, H, W]."""
    return parameters.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))


@dataclass(frozen=True)
class Noise:
    """The law of the noise of a smoothed model: whom it is against, and its level. The one place where it is written.

    Args:
        threat: what it certifies against. sigma: its standard deviation, in the unit of the threat.

    Raises:
        UserError: sigma is not positive, or out of range.

    Example:
        >>> from robustvlm.certify.threats import read_noise
        >>> str(read_noise("0.25")), str(read_noise("brightness=0.2"))
        ('0.25', 'brightness=0.2')
        >>> read_noise("brightness=0.2").fresh(torch.zeros(1, 3, 2, 2)).unique().numel()
        1
    """

    threat: Threat
    sigma: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma <= self.threat.most:
            most = f"at most {self.threat.most:g} ({self.threat.noise_unit})"
            raise UserError(f"sigma must be above 0 and {most}, got {self.sigma:g}: pass {self.threat.usual:g}")
        check_sigma(self.sigma)

    @classmethod
    def of_model(cls, threat: Threat, sigma: float) -> Noise:
        """Return the noise of a model that is deployed.

        Raises:
            UserError: there is no noise against the threat, which is certified by that against another one.
        """
        if threat.smoothed_by != threat.name:
            raise UserError(
                f"no model has noise against {threat.name}, which is certified of a model that is smoothed against "
                f"{threat.smoothed_by}: write +smooth:{sigma:g}, and certify with {setting('threat', threat.name)}"
            )
        return cls(threat, sigma)

    def __str__(self) -> str:
        level = format_exact(self.sigma)
        own = self.threat.smoothed_by  # of which sigma is the level: radii against rotation are no level of its noise
        return level if own == PLAIN else f"{own}={level}"

    def copies(self, rows: Tensor, draws: Tensor) -> Tensor:
        """Return noisy copies [R, C, H, W] of images, one each, from what their noise is made of."""
        return self.threat.noisy(rows, draws, self.sigma)

    def fresh(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a noisy copy of each image [R, C, H, W], from torch's global generator or another."""
        return self.copies(rows, fresh_draws(self.threat, rows, generator))


def fresh_draws(threat: Threat, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return what the noise of each image [R, C, H, W] is made of."""
    shape = (len(rows), *threat.draws(rows.shape[1:]))
    if threat.kind == "bits":
        return torch.empty(shape, dtype=torch.int64, device=rows.device).random_(-(2**63), None, generator=generator)
    return torch.randn(shape, dtype=rows.dtype, device=rows.device, generator=generator)

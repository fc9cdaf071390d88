"""Threats of ellipsoids: any change, of which some pixels, channels or spatial frequencies bear more than others.

*Theorem (T29).* Let B be an orthogonal change of coordinates, D a diagonal matrix of positive scales, neither of them
chosen by looking at the image that is certified, and let the noise be B^T D N(0, sigma^2 I). For h with values in
[0, 1], h_D(x) = E h(x + noise) and every x' with a = |D^-1 B (x' - x)| / sigma,

    Phi(Phi^-1(h_D(x)) - a) <= h_D(x') <= Phi(Phi^-1(h_D(x)) + a).

*Proof.* With y = D^-1 B x and k(y) = h(B^T D y), h_D(x) = E k(y + N(0, sigma^2 I)), and likewise at x'; T0 for k and
the l2 distance |y' - y|. So all that is built on T0 holds with that length in place of the l2 distance (ANCER, Eiras et
al. 2022, arXiv 2107.04570; there the scales are optimised for each image, which needs a proof of its own; here they are
fixed for all images, and there is nothing to prove but this).

*Size.* The images within R are an ellipsoid with the half-axes R s_i. The scales are brought to a geometric mean of
one, so that it has the volume of an l2 ball of radius R: the radius is ANCER's "proxy radius", to be compared with the
l2 radius under isotropic noise of the same sigma. Every change whose l2 length is below R min(s) is inside.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.noise import settings_digest
from robustvlm.certify.normal import Array
from robustvlm.certify.threats.base import Threat
from robustvlm.errors import UserError
from robustvlm.text import format_exact

_MOST_RATIO = 1e4
"""Largest scale over the smallest: beyond it the noise of some pixels is lost in the rounding of float32."""
_DIGEST = 12


class Ellipsoid(Threat):
    """Any change, by the length of its coordinates divided by scales; Gaussian noise that is larger by these scales.

    Args:
        written: the scales as they are written behind the name and `@`.

    Raises:
        UserError: they are no positive numbers, or too far apart.
    """

    usual, most = 0.25, 10.0
    kind_name: ClassVar[str]
    form: ClassVar[str]

    def __init__(self, written: str) -> None:
        self.written = written

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.kind_name}@{self.written}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ellipsoid) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.written!r})"

    @abstractmethod
    def spread(self, shape: Sequence[int]) -> Array:
        """Return the scales as they are written, spread over the coordinates of images [C, H, W].

        Raises:
            UserError: they are not about images of this shape.
        """

    def forth(self, x: Tensor) -> Tensor:
        """Return the coordinates [R, C, H, W] of changes of pixels, of the same l2 length."""
        return x

    def back(self, coordinates: Tensor) -> Tensor:
        """Return the changes of pixels [R, C, H, W] that have these coordinates."""
        return coordinates

    def scales(self, shape: Sequence[int]) -> Tensor:
        """Return the scales of the noise of images [C, H, W], in float32, their geometric mean brought to one.

        The noise has these very numbers, and so have all lengths and half-axes.
        """
        return _scales(self, tuple(shape))

    def half_axes(self, shape: Sequence[int]) -> tuple[float, float]:
        """Return the smallest half-axis of the ellipsoid of radius one, rounded down, and the largest, rounded up."""
        scales = self.scales(shape).double()
        return float(scales.min()) * (1.0 - 1e-12), float(scales.max()) * (1.0 + 1e-12)

    def noisy(self, rows: Tensor, draws: Tensor, sigma: float) -> Tensor:
        scales = self.scales(rows.shape[1:]).to(rows)
        return rows + sigma * self.back(scales * draws.to(rows))

    def length(self, changes: Tensor) -> Tensor:
        """Return the length [R] of changes [R, C, H, W] by which a radius counts, in float64."""
        wide = self.forth(changes.double()) / self.scales(changes.shape[1:]).to(changes.device, torch.float64)
        return wide.flatten(1).norm(dim=1)

    def check_pixels(self, pixels: Tensor) -> None:
        self.scales(pixels.shape[-3:])


@lru_cache(maxsize=16)
def _scales(threat: Ellipsoid, shape: tuple[int, ...]) -> Tensor:
    given = np.broadcast_to(threat.spread(shape), shape).astype(np.float64)
    return torch.from_numpy((given / np.exp(np.log(given).mean())).astype(np.float32))


def require_scales(values: Array, written: str) -> Array:
    """Return scales that are positive numbers not too far apart; refuse others."""
    if values.size == 0 or not np.isfinite(values).all() or not (values > 0.0).all():
        raise UserError(f"scales of noise must be positive numbers, got '{written}': as 1,1,2")
    if values.max() > _MOST_RATIO * values.min():
        raise UserError(
            f"the scales '{written}' differ by a factor of {float(values.max()) / float(values.min()):.3g}, at most "
            f"{_MOST_RATIO:g} is certified: pass scales that are nearer to each other"
        )
    return values


def _numbers(written: str) -> Array | None:
    """Return numbers that are written with commas between them; None for anything else."""
    try:
        return np.array([float(part) for part in written.split(",")])
    except ValueError:
        return None


class Pixels(Ellipsoid):
    """Scales of channels, as `ellipsoid@1,1,2`, or of regions or pixels, as a map in a file, `ellipsoid@map.npy`.

    A map of R rows and C columns is spread over the image, each number over its part of the height and width; one of
    three such maps [3, R, C] has scales for each channel. The name keeps the digest of what the file holds, so that
    another map is another threat, with other noise.

    Example:
        >>> threat = Pixels("1,1,8")
        >>> threat.scales((3, 1, 1)).flatten().tolist(), threat.name
        ([0.5, 0.5, 4.0], 'ellipsoid@1,1,8')
        >>> threat.length(torch.ones(1, 3, 1, 1)).item() == math.sqrt(8 + 1 / 16)
        True
    """

    kind_name = "ellipsoid"
    form = "ellipsoid@R,G,B (scales of the channels) or ellipsoid@FILE (a map: .npy, or rows of numbers)"
    unit = "ellipsoid: root of the sum of (change of a pixel / its scale)^2, scales of geometric mean 1"
    short = "ellipsoid"
    law = (
        "Gaussian with standard deviation {sigma} times the scale of its pixel (geometric mean 1), added in float32 "
        "after the resize and before the model's own normalisation, not clipped"
    )

    def __init__(self, written: str) -> None:
        channels = _numbers(written)
        self._map: Array | None = None
        if channels is not None:
            require_scales(channels, written)
            super().__init__(",".join(format_exact(float(scale)) for scale in channels))
            return
        self.path, _, known = written.partition("#")
        if known:  # a record names its map, which need not be here to be read
            super().__init__(written)
            return
        self._map = read_map(self.path)
        super().__init__(f"{self.path}#{_digest(self._map)}")

    @property
    def allows(self) -> str:  # type: ignore[override]
        return (
            "is the image plus any change d with the root of the sum of (d / scale)^2 below the radius, pixels in "
            f"[0, 1] and scales {self.written} brought to a geometric mean of 1"
        )

    def spread(self, shape: Sequence[int]) -> Array:
        channels = _numbers(self.written)
        if channels is not None:
            if len(channels) != shape[0]:
                raise UserError(
                    f"'{self.name}' has scales of {len(channels)} channels, and images have {shape[0]}: pass one each"
                )
            return channels[:, None, None]
        grid = self._read()
        if grid.shape[0] not in (1, shape[0]) or grid.shape[1] > shape[1] or grid.shape[2] > shape[2]:
            raise UserError(
                f"the map '{self.path}' of shape {list(grid.shape)} does not fit images of {list(shape)} (channels, "
                "rows, columns): pass one with 1 or as many channels and no more rows and columns"
            )
        rows, columns = (np.arange(side) * cells // side for side, cells in zip(shape[1:], grid.shape[1:], strict=True))
        return np.asarray(grid[:, rows][:, :, columns])

    def _read(self) -> Array:
        if self._map is None:
            found, known = read_map(self.path), self.written.partition("#")[2]
            if _digest(found) != known:
                raise UserError(
                    f"the map '{self.path}' has changed (its digest is {_digest(found)}, it was {known}): what was "
                    "certified or deployed with it has other noise; bring the file back, or name it without its digest"
                )
            self._map = found
        return self._map


def _digest(grid: Array) -> str:
    return settings_digest(grid)[:_DIGEST]


def read_map(path: str) -> Array:
    """Return the scales [1 or C, R, C] of a file: .npy, or rows of numbers as text.

    Raises:
        UserError: there is no such file, or it is no map of positive numbers.
    """
    try:
        if path.endswith(".npy"):
            grid = np.load(path, allow_pickle=False)
        else:
            with open(path, encoding="utf-8") as lines:
                rows = [line.replace(",", " ") for line in lines]
            grid = np.loadtxt(rows, ndmin=2) if any(map(str.strip, rows)) else np.empty((0, 0))
        if np.iscomplexobj(grid):
            raise ValueError("complex numbers")
        grid = np.asarray(grid, dtype=np.float64)
    except FileNotFoundError:
        raise UserError(
            f"scales of noise are numbers of the channels or a file with a map, and '{path}' is neither: write "
            f"{Pixels.form}"
        ) from None
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise UserError(
            f"cannot read the map '{path}' ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
            "expected .npy or rows of numbers"
        ) from None
    if grid.ndim not in (2, 3):
        raise UserError(f"the map '{path}' has {grid.ndim} dimensions: expected rows and columns, or channels as well")
    return require_scales(grid if grid.ndim == 3 else grid[None], path)


class Spectrum(Ellipsoid):
    """Scales of bands of spatial frequencies from the lowest to the highest, as `spectrum@2,1,0.5`.

    Coordinates are those of the orthonormal cosine transform (DCT-II) of each channel; the frequency of the coefficient
    (u, v) is sqrt((u / H)^2 + (v / W)^2) / sqrt(2), in [0, 1), and bands are equally wide.

    Example:
        >>> threat = Spectrum("4,1")
        >>> flat = torch.ones(1, 3, 8, 8)  # a change of all pixels alike is of the lowest frequency
        >>> round(float(threat.length(flat) / flat.norm() * threat.scales((3, 8, 8)).max()), 6)
        1.0
    """

    kind_name = "spectrum"
    form = "spectrum@LOW,...,HIGH (scales of bands of spatial frequency, as spectrum@2,1,0.5)"
    unit = (
        "spectrum: root of the sum of (cosine coefficient of the change / scale of its frequency)^2, scales of "
        "geometric mean 1"
    )
    short = "spectrum"
    law = (
        "Gaussian with standard deviation {sigma} times the scale of its frequency (geometric mean 1) in each "
        "coefficient of the cosine transform, added in float32 after the resize and before the model's own "
        "normalisation, not clipped"
    )

    def __init__(self, written: str) -> None:
        bands = _numbers(written)
        if bands is None:
            raise UserError(f"cannot read the scales '{written}': write {self.form}")
        self.bands = require_scales(bands, written)
        super().__init__(",".join(format_exact(float(scale)) for scale in bands))

    @property
    def allows(self) -> str:  # type: ignore[override]
        return (
            "is the image plus any change whose coefficients c of the orthonormal cosine transform have the root of "
            f"the sum of (c / scale)^2 below the radius, pixels in [0, 1] and the scales {self.written} of equally "
            "wide bands of frequency brought to a geometric mean of 1"
        )

    def spread(self, shape: Sequence[int]) -> Array:
        down, right = (np.arange(side) / side for side in shape[1:])
        frequency = np.hypot(down[:, None], right[None, :]) / math.sqrt(2.0)
        return self.bands[np.minimum((frequency * len(self.bands)).astype(int), len(self.bands) - 1)]

    def forth(self, x: Tensor) -> Tensor:
        down, right = (cosines(side).to(x.device) for side in x.shape[2:])
        return _both(down, right, x)

    def back(self, coordinates: Tensor) -> Tensor:
        down, right = (cosines(side).T.to(coordinates.device) for side in coordinates.shape[2:])
        return _both(down, right, coordinates)


@lru_cache(maxsize=16)
def cosines(side: int) -> Tensor:
    """Return the orthonormal DCT-II of a line of pixels as a matrix [side, side] in float64.

    Example:
        >>> bool(torch.allclose(cosines(5) @ cosines(5).T, torch.eye(5, dtype=torch.float64)))
        True
    """
    k, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)[None]
    matrix = torch.cos(torch.pi * k * (place + 0.5) / side) * math.sqrt(2.0 / side)
    matrix[0] = math.sqrt(1.0 / side)
    return matrix


def _both(down: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Return `down x right^T` of every channel: in float64, one product a channel, so that batches change no bit."""
    flat = x.to(torch.float64).flatten(0, 1)
    found = torch.bmm(down.expand(len(flat), -1, -1), flat)
    found = torch.bmm(right.expand(len(flat), -1, -1), found.transpose(1, 2)).transpose(1, 2)
    return found.view(x.shape).to(x.dtype)

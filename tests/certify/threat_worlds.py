"""For every threat the classifier that keeps least of a share: a half-space of the parameter, whose radius is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustvlm.certify.threats import Noise, find_threat, read_noise


@dataclass(frozen=True)
class World:
    """An image, noise, and a classifier that reads off one coordinate of what was done to the image.

    Args:
        noise: as it is written. clean: [1, C, H, W]. read: from noisy images [R, C, H, W] to the coordinate [R].
        edge: class 0 up to here. truth: the distance at which class 0 loses its majority.
        attack: the image at a distance in the worst direction.
    """

    noise: Noise
    clean: Tensor
    read: Callable[[Tensor], Tensor]
    edge: float
    truth: float
    attack: Callable[[float], Tensor]

    def kept(self, noisy: Tensor) -> Tensor:
        """Whether images are put into class 0, [R]."""
        return self.read(noisy) <= self.edge


def _moved(text: str, clean: Tensor, read: Callable[[Tensor], Tensor], along: tuple[float, ...]) -> World:
    noise = read_noise(text)
    edge = 1.25 * noise.sigma

    def attack(eps: float) -> Tensor:
        return noise.threat.move(clean, eps * torch.tensor([along]))  # type: ignore[attr-defined]

    return World(noise, clean, read, edge, edge, attack)


def brightness() -> World:
    clean = torch.full((1, 3, 1, 2), 0.5)
    return _moved("brightness=0.2", clean, lambda z: z[:, 0, 0, 0] - 0.5, (1.0,))


def contrast() -> World:
    clean = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)
    return _moved("contrast=0.3", clean, lambda z: ((z[:, 0, 0, 1] - z[:, 0, 0, 0]) / 0.5).log(), (1.0,))


def light() -> World:
    clean = torch.tensor([0.25, 0.75]).expand(1, 3, 1, 2)

    def read(z: Tensor) -> Tensor:
        return 0.6 * (z.mean(dim=(1, 2, 3)) - 0.5) + 0.8 * ((z[:, 0, 0, 1] - z[:, 0, 0, 0]) / 0.5).log()

    return _moved("light=0.2", clean, read, (0.6, 0.8))


def gamma() -> World:
    clean = torch.full((1, 3, 1, 2), 0.5)
    return _moved("gamma=0.4", clean, lambda z: (z[:, 0, 0, 0].log() / math.log(0.5)).log(), (1.0,))


def colour() -> World:
    clean = torch.full((1, 3, 1, 2), 0.5)

    def read(z: Tensor) -> Tensor:
        gains = (z[:, :, 0, 0] / 0.5).log()
        return gains @ torch.tensor([2.0, -1.0, 2.0]) / 3.0

    return _moved("colour=0.2", clean, read, (2 / 3, -1 / 3, 2 / 3))


def translation() -> World:
    noise, clean, side = read_noise("translation=2"), torch.zeros(1, 3, 1, 32), 32
    clean[..., 0] = 1.0

    def read(z: Tensor) -> Tensor:
        place = z[:, 0, 0].argmax(dim=1)
        return torch.where(place < side // 2, place, place - side).double()

    def attack(eps: float) -> Tensor:
        return torch.roll(clean, math.ceil(eps - 1e-9), dims=3)

    return World(noise, clean, read, 2.0, 2.5, attack)


def plain() -> World:
    noise, along = read_noise("0.25"), torch.tensor([1.0, -2.0, 2.0]) / 3.0
    clean = torch.full((1, 3, 1, 1), 0.5)

    def read(z: Tensor) -> Tensor:
        return (z - clean).flatten(1) @ along

    return World(noise, clean, read, 0.3, 0.3, lambda eps: clean + eps * along.view(1, 3, 1, 1))


def whole() -> World:
    noise, clean = read_noise("8bit=0.02"), torch.full((1, 1, 1, 1), 100 / 255)

    def read(z: Tensor) -> Tensor:
        return (255 * z[:, 0, 0, 0].double()).round() - 100

    return World(noise, clean, read, 6.0, 6.5 / 255, lambda eps: clean + math.ceil(255 * eps - 1e-9) / 255)


def l1() -> World:
    noise, clean = read_noise("l1=0.25"), torch.full((1, 3, 1, 1), 0.5)
    width = math.sqrt(3.0) * 0.25
    attack = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    # At the distance eps the share is (edge + width - eps) / 2 width, in the one pixel that is changed.
    return World(
        noise, clean, lambda z: z[:, 0, 0, 0] - 0.5, 0.75 * width, 0.75 * width, lambda eps: clean + eps * attack
    )


def ellipsoid(name: str, clean: Tensor) -> World:
    """A half-space along one coordinate, reached by the change that costs least of the radius."""
    noise, scales = read_noise(f"{name}=0.25"), find_threat(name).scales(clean.shape[1:])  # type: ignore[attr-defined]
    coordinate = torch.zeros_like(clean).flatten()
    coordinate[int(scales.argmin())] = 1.0  # the shortest half-axis
    along = noise.threat.back(coordinate.view_as(clean)) * scales.min()  # type: ignore[attr-defined]
    edge = 1.25 * noise.sigma

    def read(z: Tensor) -> Tensor:
        return ((z - clean) * along).flatten(1).sum(dim=1) / scales.min() ** 2

    return World(noise, clean, read, edge, edge, lambda eps: clean + eps * along)


ELLIPSOIDS = ("ellipsoid@1,2,4", "spectrum@4,2,1")
WORLDS: dict[str, Callable[[], World]] = {
    "l2": plain, "8bit": whole, "l1": l1, "brightness": brightness, "contrast": contrast, "light": light,
    "gamma": gamma, "colour": colour, "translation": translation,
    "ellipsoid@1,2,4": partial(ellipsoid, "ellipsoid@1,2,4", torch.full((1, 3, 1, 1), 0.5)),
    "spectrum@4,2,1": partial(ellipsoid, "spectrum@4,2,1", torch.full((1, 1, 1, 2), 0.5)),
}  # fmt: skip
"""One for each threat."""

"""Common corruptions by name and severity: what `--corrupt` names, how severe that is, and images changed by it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustvlm.core.seeds import derive_seed
from robustvlm.data import corrupting as how
from robustvlm.errors import BadSetting, nearest

GROUPS = {
    "noise": ("gaussian-noise", "shot-noise", "impulse-noise"),
    "blur": ("defocus-blur", "glass-blur", "motion-blur", "zoom-blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic-transform", "pixelate", "jpeg-compression"),
}
NAMES: tuple[str, ...] = tuple(name for names in GROUPS.values() for name in names)
"""The fifteen kinds of ImageNet-C, in its order."""
SEVERITIES = (1, 2, 3, 4, 5)
SIDES = (32, 64, 224)
"""Sides in pixels for which ImageNet-C's authors chose what a severity is."""


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption at one severity; called with the pixels of an image, it returns them corrupted.

    Example:
        >>> foggy = Corruption("fog", 3)
        >>> foggy.text, foggy(torch.full((3, 64, 64), 0.5), "photo-1").shape
        ('fog:3', torch.Size([3, 64, 64]))
    """

    name: str
    severity: int

    @property
    def text(self) -> str:
        """How it is written: `NAME:SEVERITY`."""
        return f"{self.name}:{self.severity}"

    def __call__(self, pixels: Tensor, image_id: str) -> Tensor:
        """Return float32 pixels [3, H, W] in [0, 1], in steps of 1/255; the draws are the image's and the kind's own.

        The severities of a kind draw from the same stream. Lengths grow with the shorter side, measured in the nearest
        of `SIDES`, the blocks of `pixelate` above that side alone; noise and quality do not depend on it.

        Args:
            pixels: [3, H, W] in [0, 1], as the model will see it. image_id: what the draws are named by.
        """
        image = pixels.detach().cpu().double().numpy().transpose(1, 2, 0)
        side = min(image.shape[:2])
        random = np.random.default_rng(derive_seed("corrupt", self.name, image_id))
        nearest_side = table_side(side)
        level = _LEVELS[nearest_side][self.name][self.severity - 1]
        changed = how.KINDS[self.name](image, level, side / nearest_side, random)
        steps = np.rint(255.0 * np.clip(changed, 0.0, 1.0)) / 255.0
        return torch.from_numpy(np.ascontiguousarray(steps.transpose(2, 0, 1))).float()


def table_side(side: int) -> int:
    """Return the side, of those that severities are defined for, whose ratio to `side` is the smallest.

    Example:
        >>> table_side(36), table_side(64), table_side(384)
        (32, 64, 224)
    """
    return min(SIDES, key=lambda known: max(known / side, side / known))


def parse_corruptions(text: str) -> tuple[Corruption, ...]:
    """Return what `all`, or `NAME[:SEVERITY]` after `NAME[:SEVERITY]`, means, each once, in the order of the kinds.

    Without a severity all five are meant, and `all:3` is every kind at severity 3. ImageNet-C's underscores are
    understood.

    Raises:
        BadSetting: there is no such kind, or no such severity.

    Example:
        >>> [one.text for one in parse_corruptions("fog:2,snow:5,fog:2")]
        ['snow:5', 'fog:2']
        >>> len(parse_corruptions("all"))
        75
    """
    wanted: set[tuple[str, int]] = set()
    for part in text.split(","):
        word, colon, number = part.strip().partition(":")
        name = word.strip().lower().replace("_", "-").replace(" ", "-")
        if name != "all" and name not in NAMES:
            hint = nearest(name, ("all", *NAMES))
            raise BadSetting(
                "corrupt", f"must be all or kinds of corruption, as fog:3,snow; got '{part.strip()}': {hint}"
            )
        if colon and number.strip() not in map(str, SEVERITIES):
            raise BadSetting("corrupt", f"takes a severity from 1 to 5 behind the colon, as {name}:3", got=f"'{part}'")
        levels = (int(number),) if colon else SEVERITIES
        wanted |= {(one, level) for one in (NAMES if name == "all" else (name,)) for level in levels}
    return tuple(Corruption(name, level) for name in NAMES for level in SEVERITIES if (name, level) in wanted)


def weights_of(corruptions: Sequence[Corruption]) -> list[float]:
    """Return the weight of each in a mean over severities first and kinds then: every kind counts alike.

    Example:
        >>> weights_of(parse_corruptions("fog:1,fog:2,snow:3"))
        [0.5, 0.25, 0.25]
    """
    counts = Counter(one.name for one in corruptions)
    return [1 / len(counts) / counts[one.name] for one in corruptions]


def written(corruptions: Sequence[Corruption]) -> str:
    """Return corruptions as a manifest has them: in one order, however they were asked for.

    Example:
        >>> written(parse_corruptions("snow:2,fog:1,gaussian_noise:5"))
        'gaussian-noise:5,snow:2,fog:1'
    """
    return ",".join(one.text for one in corruptions)


def corrupted(pixels: Tensor, ids: Sequence[str], corruption: Corruption) -> Tensor:
    """Return a batch of pixels [B, 3, H, W] in [0, 1] under one corruption, each image with its own draws.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> corrupted(images, ["a", "b"], Corruption("contrast", 5)).shape
        torch.Size([2, 3, 32, 32])
    """
    return torch.stack([corruption(image, name) for image, name in zip(pixels, ids, strict=True)])


# What a severity is, by the side of the image (Hendrycks and Dietterich 2019, arXiv 1903.12261, and the constants that
# its authors published with it, for ImageNet-C, Tiny-ImageNet-C and CIFAR-10-C). The meaning of the numbers stands at
# each function of `corrupting`.

_Levels = dict[str, tuple[tuple[float, ...], ...]]


def _each(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


_AT_32: _Levels = {
    "gaussian-noise": _each(0.04, 0.06, 0.08, 0.09, 0.10),
    "shot-noise": _each(500, 250, 100, 75, 50),
    "impulse-noise": _each(0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus-blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass-blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion-blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom-blur": ((1.05, 0.01), (1.10, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": _each(0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": _each(0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic-transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": _each(0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg-compression": _each(80, 65, 58, 50, 40),
}
_AT_64: _Levels = {
    "gaussian-noise": _each(0.04, 0.08, 0.12, 0.15, 0.18),
    "shot-noise": _each(250, 100, 50, 30, 15),
    "impulse-noise": _each(0.01, 0.02, 0.05, 0.08, 0.14),
    "defocus-blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    "glass-blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    "motion-blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    "zoom-blur": _AT_32["zoom-blur"],
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
    ),
    "frost": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "brightness": _each(0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": _each(0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic-transform": ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
    "pixelate": _each(0.9, 0.8, 0.7, 0.6, 0.5),
    "jpeg-compression": _each(65, 58, 50, 40, 25),
}
_OF_244 = 244 / 224
"""The elastic constants of ImageNet-C are shares of 244 pixels, its images have 224."""
_AT_224: _Levels = {
    "gaussian-noise": _each(0.08, 0.12, 0.18, 0.26, 0.38),
    "shot-noise": _each(60, 25, 12, 5, 3),
    "impulse-noise": _each(0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus-blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass-blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion-blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom-blur": ((1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.25, 0.02), (1.30, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": _each(0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": _each(0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic-transform": tuple(
        tuple(_OF_244 * share for share in shares)
        for shares in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    "pixelate": _each(0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg-compression": _each(25, 18, 15, 10, 7),
}
_LEVELS: dict[int, _Levels] = {32: _AT_32, 64: _AT_64, 224: _AT_224}

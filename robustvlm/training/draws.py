"""Random numbers of one training step that belong to images, not to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustvlm.core.seeds import derive_seed, generator

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Draws:
    """The random numbers of one step: those of an image depend on the run's seed, the step and the image's id alone.

    So they are the same whether the batch is cut into ranks or accumulated parts, or not cut at all, and the same on
    every device. `generator()` is for draws that concern the whole step; it is the same on every rank.

    Args:
        seed: of the run; step: number of the step; ids: of the images, one a row.
        device: where the numbers are wanted.

    Example:
        >>> draws = Draws(0, 7, ["a", "b"])
        >>> whole = draws.uniform(torch.empty(2, 3, 4, 4))
        >>> alone = Draws(0, 7, ["b"]).uniform(torch.empty(1, 3, 4, 4))
        >>> torch.equal(whole[1:], alone)
        True
    """

    def __init__(self, seed: int, step: int, ids: Sequence[str], *, device: str | torch.device = "cpu") -> None:
        self.seed, self.step, self.ids = seed, step, tuple(ids)
        self.device = torch.device(device)

    def generator(self, name: str = "") -> torch.Generator:
        """Return a CPU generator for draws that concern the step as a whole."""
        return generator(self.seed, "step", self.step, name)

    def uniform(self, like: Tensor, name: str = "") -> Tensor:
        """Return float32 numbers in [0, 1) of the shape of `like` [B, ...], row i from the stream of image i.

        `name` tells several draws of one step apart. Source of the stream: a counter put through the finaliser of
        SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), 24 bits of each result.
        """
        bits = self._bits(like[0].numel(), name)
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).view(like.shape)

    def normal(self, like: Tensor, name: str = "") -> Tensor:
        """Return float32 standard normal numbers of the shape of `like` [B, ...], row i from the stream of image i."""
        bits = self._bits(like[0].numel(), name)
        if bits.device.type == "mps":  # which has no float64
            bits = bits.cpu()
        # 52 bits, centred in their cell, so that neither tail is cut short of 8 standard deviations.
        uniform = ((bits >> 12) & (2**52 - 1)).to(torch.float64).add_(0.5).mul_(2.0**-52)
        return torch.special.ndtri(uniform).to(self.device, torch.float32).view(like.shape)

    def _bits(self, count: int, name: str) -> Tensor:
        """Return 64 random bits per number, int64 [B, count]."""
        seeds = [derive_seed(self.seed, "image", self.step, image, name) for image in self.ids]
        start = torch.tensor(seeds, dtype=torch.int64, device=self.device)[:, None]
        return _mixed(start + _GOLDEN * torch.arange(1, count + 1, dtype=torch.int64, device=self.device))


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap as those of unsigned numbers do."""
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; `>>` alone would fill with the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)

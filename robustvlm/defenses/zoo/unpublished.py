"""Defences whose weights or constants are not public: named with the reason, and never guessed into a bad figure.

AOM can be written with every constant; the others are rows of a judgement that say why they have no figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.defenses.zoo import base as zoo
from robustvlm.defenses.zoo.views import View, drawn, features_of


@dataclass(frozen=True)
class Unpublished:
    """A published defence that cannot be run from what its authors give.

    Attributes:
        title, reference: as of every defence. claimed: the published figure with its setting, in words.
        reason: why it cannot be run, for one line.
    """

    title: str
    reference: str
    claimed: str
    reason: str


AOM_REASON = "its noise, number of draws and step length are not published, and there is no code: write all three"

UNPUBLISHED = {
    "tapt": Unpublished(
        "TAPT, test-time adversarial prompt tuning",
        "Wang, Chen, Zhang, Chen, Ma, CVPR 2025, arXiv 2411.13136",
        "48.9 points or more over CLIP under AutoAttack at Linf 1/255, 11 sets; points of the prompt-trained base "
        "without the test-time step",
        "the adversarially trained prompts and the training images' statistics that it starts from are not public",
    ),
    "fpt": Unpublished(
        "FPT-Noise",
        "Deng et al., 2025, arXiv 2510.20856",
        "56.86 % under AutoAttack, from 0.07 %, at 1.1 points of clean accuracy, 16 sets; radius not read",
        "its constants are not public, and the code is only announced",
    ),
    "atac": Unpublished(
        "ATAC",
        "Su, Balogh, 2025, arXiv 2511.17362",
        "robustness under attacks unaware of it and under an adaptive one; no figure was read",
        "its constants are not public, and the code could not be had",
    ),
    "aom": Unpublished("AOM", "Tong, Lai, Pan, Yin, CVPR 2025", "no figure was read", AOM_REASON),
}
"""By operator, what is known of each; `aom` without its arguments."""


def unpublished(name: str, arguments: tuple[str, ...]) -> Unpublished | None:
    """Return why an operator cannot be run as it is written; None where it can.

    Example:
        >>> unpublished("atac", ()).title, unpublished("aom", ("0.1", "8", "1")), unpublished("bits", ())
        ('ATAC', None, None)
    """
    return None if name in zoo.DEFENCES and arguments else UNPUBLISHED.get(name)


def _with_noise(pixels: Tensor, noise: Tensor) -> Tensor:
    return pixels + noise.to(pixels).view_as(pixels)


@zoo.DEFENCES.named("aom")
@dataclass(frozen=True)
class NoiseAnchor(zoo.FeatureDefence):
    """The feature moved towards the mean feature of noisy copies: f + pull (A - f), at length 1.

    Example:
        >>> from robustvlm.defenses import load_pipeline
        >>> load_pipeline("tiny+aom:0.1:2:1").encode_image(torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 192])
    """

    about = zoo.About(
        title="AOM, towards a noise-averaged anchor",
        reference="Tong, Lai, Pan, Yin, CVPR 2025",
        summary="the feature moved towards that of noisy copies (pull 0: off); all constants have to be written",
        fidelity=zoo.DESCRIPTION,
        differs=("Its constants are not published: they are the user's.",),
        licence_note="no code",
    )
    explicit = AOM_REASON
    off = "0.1:1:0"
    random = True

    sigma: Annotated[float, zoo.Strength("standard deviation of the noise, in pixels of [0, 1]", 0, 10)] = 0.1
    draws: Annotated[int, zoo.Strength("noisy copies", 1, 4096)] = 8
    pull: Annotated[float, zoo.Strength("how far the feature goes: 1 is the anchor, 0 is off", 0, 100)] = 1.0

    @property
    def gradient_draws(self) -> int:
        return zoo.draws_of_views(self.draws)

    def cost(self, *, gate_open: bool = True) -> zoo.Passes:
        del gate_open
        return zoo.Passes(1 + self.draws if self.pull else 1)

    @property
    def idle(self) -> bool:
        return not self.pull

    def feature(self, pixels: Tensor, below: zoo.Below, mode: str) -> Tensor:
        del mode
        own = below.encode(pixels)
        if self.idle:
            return own
        anchor = F.normalize(features_of(below.encode, self._copies(pixels), pixels).mean(1), dim=1)
        return F.normalize(own + self.pull * (anchor - own), dim=1)

    def _copies(self, pixels: Tensor) -> list[View]:
        size = pixels[0].numel()
        noise = [self.sigma * torch.randn(self.draws, size, generator=one) for one in zoo.generators(pixels)]
        return drawn(_with_noise, torch.stack(noise))

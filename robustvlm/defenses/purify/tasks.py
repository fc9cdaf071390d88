"""The two stages of training, as tasks of the engine: the purifier before the encoder, then the mapper behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from robustvlm.core.seeds import generator
from robustvlm.defenses.purify.levels import NoiseLevels
from robustvlm.defenses.purify.losses import (
    MapperWeights,
    PurifierWeights,
    mapper_terms,
    purifier_terms,
    weighted,
)
from robustvlm.defenses.purify.mapper import Mapper
from robustvlm.defenses.purify.unet import Purifier
from robustvlm.defenses.purify.vlm import PurifiedVLM
from robustvlm.models import VLM
from robustvlm.stats import mean
from robustvlm.training import Draws, Measure, Task, gathered

_ROWS = 64


class PurifierTask(Task):
    """Stage one: the purifier learns to denoise, and to give the frozen encoder what it would make of the clean image.

    Args:
        purifier: what is trained. encoder: frozen; gradients pass through it to the purifier only.
        levels: noise to train for. weights: of the terms of the loss.
        held_out: images [N, 3, S, S] on which the Gaussian robustness score is watched.
    """

    labelled = False

    def __init__(
        self, purifier: Purifier, encoder: VLM, levels: NoiseLevels, weights: PurifierWeights, held_out: Tensor
    ) -> None:
        super().__init__(purifier)
        self.purifier, self.encoder, self.levels = purifier, encoder.requires_grad_(False), levels
        self.weights, self.held_out = asdict(weights), held_out

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        """Return the weighted sum and the terms of stage one."""
        del labels, step
        with torch.no_grad():
            clean = self.encoder.encode_image(pixels)
        sigma = self.levels.at(draws.uniform(pixels.new_empty(len(pixels), 2), "sigma"))
        noisy = pixels + sigma.view(-1, 1, 1, 1) * draws.normal(pixels, "noise")
        estimate = self.purifier(noisy, sigma)
        features = self.encoder.encode_image(estimate.to(pixels.dtype))
        return weighted(purifier_terms(estimate, pixels, sigma, features, clean), self.weights)

    def validate(self) -> Mapping[str, Measure]:
        """Return the score at every level given, behind the purifier."""
        return scores(PurifiedVLM(self.encoder, self.purifier, None), self.held_out, self.levels)


class MapperTask(Task):
    """Stage two: the mapper learns to give back the features of the clean image, behind the finished purifier.

    A step has one noise level, so that the statistics of its features are those of one distribution.

    Args:
        mapper: what is trained. encoder: what stands before it, told the noise level by `at_noise`.
        reference: the encoder whose clean features are aimed at.
        levels, weights, held_out: as for `PurifierTask`.
    """

    labelled = False

    def __init__(
        self,
        mapper: Mapper,
        encoder: VLM,
        reference: VLM,
        levels: NoiseLevels,
        weights: MapperWeights,
        held_out: Tensor,
    ) -> None:
        super().__init__(mapper)
        self.mapper, self.encoder, self.reference, self.levels = mapper, encoder, reference, levels
        self.weights, self.held_out = {"similarity": 1.0, **asdict(weights)}, held_out

    def losses(self, pixels: Tensor, labels: Tensor, step: int, draws: Draws) -> dict[str, Tensor]:
        """Return the weighted sum and the terms of stage two."""
        del labels, step
        sigma = float(self.levels.at(torch.rand(1, 2, generator=draws.generator("sigma"))))
        with torch.no_grad():
            clean = self.reference.encode_image(pixels)
            noisy = self.encoder.at_noise(sigma).encode_image(pixels + sigma * draws.normal(pixels, "noise"))
        mapped = F.normalize(self.mapper(noisy, sigma).float(), dim=1)
        return weighted(mapper_terms(gathered(mapped), gathered(clean)), self.weights)

    def validate(self) -> Mapping[str, Measure]:
        """Return the score at every level given, behind purifier and mapper."""
        return scores(PurifiedVLM(self.encoder, None, self.mapper), self.held_out, self.levels)


def scores(vlm: VLM, images: Tensor, levels: NoiseLevels, *, draws: int = 2, seed: int = 0) -> dict[str, Measure]:
    """Return the Gaussian robustness score E(1 + cos(f(x + e), f(x))) / 2 at every level, over images and draws.

    The noise is the same in every call, so that the weights of different steps are compared on the same draws.

    Example:
        >>> from robustvlm.models import load_model
        >>> found = scores(load_model("tiny"), torch.rand(4, 3, 64, 64), NoiseLevels((0.01, 0.5)))
        >>> found["score at 0.01"].value > found["score at 0.5"].value
        True
    """
    found: dict[str, Measure] = {}
    with torch.no_grad():
        clean = torch.cat([vlm.encode_image(part) for part in images.split(_ROWS)])
        for sigma in levels.given:
            told, noise = vlm.at_noise(sigma), generator(seed, "score", repr(sigma))
            total = torch.zeros(len(images), device=clean.device)
            for _ in range(draws):
                for i, part in enumerate(images.split(_ROWS)):
                    e = torch.randn(part.shape, generator=noise).to(part)
                    features = told.encode_image(part + sigma * e)
                    total[i * _ROWS : i * _ROWS + len(part)] += (features * clean[i * _ROWS :][: len(part)]).sum(dim=1)
            found[f"score at {sigma:g}"] = mean((0.5 * (1 + total / draws)).tolist())
    return found

"""Claims about classes under noise that is chosen for each image: the plan of any of them, and the vote to attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from robustvlm.certify.claims.base import Asked, Claim, Materials, Plan, Quantity, pilot_size
from robustvlm.certify.deployed import answered_share_needed
from robustvlm.certify.limits import best_vote_radius
from robustvlm.certify.local_noise import LocalNoise, LocalRadius
from robustvlm.certify.means import clopper_pearson_lower
from robustvlm.certify.normal import Array


@dataclass(frozen=True)
class _Level:
    """The settings of a claim at one noise level: those of the run, with a share of its samples and half of alpha."""

    whole: Asked
    sigma: float
    samples: int
    n_pilot: int
    alpha: float
    deployed: int | None
    abstains_at: float | None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def copies_for_noise(samples: int) -> int:
    """Return how many of the samples of an image choose its noise level and judge that choice: a quarter.

    Example:
        >>> copies_for_noise(1000)
        250
    """
    return samples // 4


def deployed_for_noise(n0: int) -> int:
    """Return how many of the copies of a deployed model choose the noise level; the others answer."""
    return n0 // 2


def answering_alpha(alpha: float, *, votes: bool) -> float:
    """Return the level of the test of the class, so that a wrong level and a wrong class have `alpha` together.

    A vote at alpha is wrong with probability alpha / 2 only, which is also what the vote for the noise level spends.

    Example:
        >>> answering_alpha(0.001, votes=True), answering_alpha(0.001, votes=False)
        (0.001, 0.0005)
    """
    return alpha if votes else 0.5 * alpha


def local_plan(claim: Claim, noise: LocalNoise, asked: Asked, materials: Materials, *, votes: bool) -> Plan:
    """Return the plan of a claim about classes where the noise level is chosen for each image (T22).

    Args:
        votes: the claim, and the deployed model with it, answers by vote.
    """
    rest = lambda n: n - copies_for_noise(n)  # noqa: E731
    samples, alpha0 = rest(asked.samples), asked.abstains_at
    choosing = 0 if asked.deployed is None else deployed_for_noise(asked.deployed)

    def level(sigma: float) -> Plan:
        settings = _Level(
            whole=asked,
            sigma=sigma,
            samples=samples,
            n_pilot=pilot_size(samples, early=False),
            alpha=0.5 * asked.alpha,
            deployed=None if asked.deployed is None else asked.deployed - choosing,
            abstains_at=None if alpha0 is None else answering_alpha(alpha0, votes=votes),
        )
        return claim.plan(cast(Asked, settings), materials)

    levels = [level(sigma) for sigma in noise.sigmas]
    certifier = partial(
        LocalRadius,
        noise=noise,
        text=materials.classes,
        certifier=lambda i: levels[i].certifier(),
        alpha=asked.alpha,
        n=samples,
        n_noise=copies_for_noise(asked.samples),
        share=None if alpha0 is None else answered_share_needed(choosing, alpha0, 0.5 * asked.alpha),
    )

    def best(n: int) -> float:
        judging = copies_for_noise(n) - max(1, copies_for_noise(n) // 5)
        if judging < 1:
            return 0.0
        kept = best_vote_radius(judging, 0.5 * asked.alpha, noise.at)
        return min(kept, max(plan.best(rest(n)) for plan in levels))

    split = {"vote for the noise level (Clopper-Pearson)": 0.5 * asked.alpha, **levels[0].alpha_split}
    return replace(
        levels[0],
        statement=f"{levels[0].statement}, at a noise level that is chosen for the image and stays the same",
        rule=f"{claim.rule}, at {noise.words}",
        theorem="T22",
        bound=f"clopper-pearson+{levels[0].bound}" if levels[0].bound != "clopper-pearson" else "clopper-pearson",
        alpha_split=split,
        best=best,
        certifier=certifier,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseQuantity(Quantity):
    """More than half of the copies at the noise `noise.at` vote for the level `level` (T22)."""

    noise: LocalNoise
    text: Array
    level: int
    radius: float

    words = "share of noisy copies that vote for the noise level"

    @property
    def sigma(self) -> float:
        """The noise level of the copies that vote."""
        return self.noise.at

    def bound(self, eps: float) -> float:
        return 0.5 if eps <= self.radius else -1.0

    def score(self, features: Tensor, aim: Tensor) -> Tensor:
        text = torch.as_tensor(self.text, dtype=features.dtype, device=features.device)
        leading = (features @ text.T).topk(2, dim=-1).values
        margin = leading[..., 0] - leading[..., 1]
        ends = [end for end in self._ends if np.isfinite(end)]
        gaps = torch.stack([margin - end for end in ends], dim=-1) * torch.tensor(
            [1.0 if end == self._ends[0] else -1.0 for end in ends], dtype=margin.dtype, device=margin.device
        )
        # As steep as copies are spread, and never so steep that those far from the end have no slope left.
        width = (
            torch.maximum(margin.detach().std(correction=0), gaps.detach().abs().mean()).nan_to_num(1.0).clamp_min(1e-6)
        )
        within = torch.sigmoid(2.0 * gaps / width)
        # Aims take turns: out of the level on either side, and past each of its ends.
        pursued = torch.cat([within.prod(dim=-1, keepdim=True), within], dim=-1)
        turn = (aim % pursued.shape[-1]).view(-1, 1, 1).expand(-1, margin.shape[1], 1)
        return pursued.gather(2, turn)[..., 0].mean(dim=1)

    @property
    def _ends(self) -> tuple[float, float]:
        ends = (-np.inf, *self.noise.thresholds, np.inf)
        return ends[self.level], ends[self.level + 1]

    def value(self, features: Array) -> float:
        return float(self._votes(features).mean())

    def upper(self, features: Array, alpha: float) -> float:
        against = len(features) - int(self._votes(features).sum())
        return 1.0 - float(clopper_pearson_lower(against, len(features), alpha))

    def _votes(self, features: Array) -> Array:
        said = self.noise.levels(features, self.text)
        return np.asarray((said == self.level) | (said < 0))  # a failed pass must not look like a broken claim


def noise_audited(noise: LocalNoise, row: Mapping[str, Any], materials: Materials, sigma: float) -> NoiseQuantity:
    """Return what an audit attacks of the choice of the noise level `sigma` of a row of results."""
    level = noise.sigmas.index(sigma)
    return NoiseQuantity(noise=noise, text=materials.classes, level=level, radius=row["radius"])

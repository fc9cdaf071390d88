"""Certificates held against attacks: how low an attacked smoothed model gets, beside the bound that it must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from robustvlm.certify.claims import Quantity
from robustvlm.certify.normal import Array
from robustvlm.core.seeds import derive_seed
from robustvlm.defenses import SmoothedVLM
from robustvlm.errors import UserError
from robustvlm.evaluation.audit_search import (
    BLIND_STARTS,
    STARTS,
    Effort,
    descend,
    has_gradient,
    into_ball,
    starts,
    unit,
)

# Bounds hold strictly inside the radius, and up to floating point.
_INSIDE = 1.0 - 1e-5

BLIND = ", without a gradient"
"""What is added to a start's kind where the encoder gave no gradient."""


class Finding(BaseModel):
    """The lowest value that the audit reached for one image at one distance, beside the certified bound.

    `upper` is an upper confidence bound of the true value at the point found: the bound counts as broken only if even
    that is below it, so that Monte-Carlo error is never called a violation (error probability: see `Effort.alpha`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_id: str
    fraction: float
    eps: float
    bound: float
    lowest: float
    upper: float
    start: str

    @property
    def broken(self) -> bool:
        """Whether the certified bound is shown to be false."""
        return self.upper < self.bound


@dataclass(frozen=True, kw_only=True)
class Target:
    """A certificate to audit: pixels [1, 3, S, S] at the model's resolution, its radius, and what it claims.

    `claim` is made from two independent samples of the clean image's features: one to steer by, one as evidence.
    """

    image_id: str
    pixels: Tensor
    radius: float
    claim: Callable[[Array, Array], Quantity]


def audit_image(vlm: SmoothedVLM, target: Target, effort: Effort, *, alpha: float, seed: int) -> list[Finding]:
    """Attack one certificate at every fraction of its radius; the search starts anew at the full radius.

    Args:
        vlm: the smoothed model with the certificate's noise level.
        alpha: probability of calling a true bound broken, over the findings of this image.
        seed: of the run; noise is fresh, from streams of its own.

    Raises:
        UserError: the certificate is about another noise level than the model's.
    """
    cuda = [vlm.device] if vlm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(derive_seed(seed, target.image_id, "audit"))
        clean = target.pixels.to(vlm.device)
        claim = target.claim(_features(vlm, clean, effort.choice), _features(vlm, clean, effort.evidence))
        level = getattr(claim, "sigma", None)
        if level not in (None, vlm.sigma):
            raise UserError(f"the certificate is about noise of {level}, the model's is {vlm.sigma}")
        full = target.radius * _INSIDE
        blind = not _sees(vlm, clean, full, claim)
        aim = torch.arange(effort.starts, device=vlm.device) // len(BLIND_STARTS if blind else STARTS)
        begin, kinds = starts(vlm, clean, full, claim.score, aim, blind=blind)
        found = descend(vlm, clean, begin, full, claim.score, aim, effort, blind=blind)
        findings = []
        for fraction in sorted(effort.fractions, reverse=True):
            eps = fraction * full
            points = _pushed(clean, found, eps)
            if fraction < 1.0:
                points = _refined(vlm, clean, points, eps, claim, aim, effort, blind=blind)
            values = [claim.value(_features(vlm, point[None], effort.choice)) for point in points]
            best = int(np.argmin(values))
            evidence = _features(vlm, points[best : best + 1], effort.evidence)
            findings.append(
                Finding(
                    image_id=target.image_id,
                    fraction=fraction,
                    eps=eps,
                    bound=claim.bound(eps),
                    lowest=claim.value(evidence),
                    upper=claim.upper(evidence, alpha / len(effort.fractions)),
                    start=kinds[best % len(kinds)] + (BLIND if blind else ""),
                )
            )
    return findings[::-1]


def _sees(vlm: SmoothedVLM, clean: Tensor, eps: float, claim: Quantity) -> bool:
    """Whether there is a gradient to follow, at the clean image or at a random point of the ball."""
    draws = torch.Generator().manual_seed(0)
    aside = torch.randn(clean.shape, generator=draws).to(clean.device, clean.dtype)
    points = torch.cat([clean, clean + eps * unit(aside)])
    return has_gradient(vlm, points, claim.score, torch.zeros(len(points), dtype=torch.long, device=clean.device))


def _refined(
    vlm: SmoothedVLM,
    clean: Tensor,
    drawn_in: Tensor,
    eps: float,
    claim: Quantity,
    aim: Tensor,
    effort: Effort,
    *,
    blind: bool,
) -> Tensor:
    """Return points at a smaller distance: those of the full radius drawn in, as they are and after a short descent."""
    short = Effort(steps=max(1, effort.steps // 4), draws=effort.draws)
    refined = descend(vlm, clean, drawn_in - clean, eps, claim.score, aim, short, blind=blind)
    return torch.cat([drawn_in, _pushed(clean, refined, eps)])


def _pushed(clean: Tensor, points: Tensor, eps: float) -> Tensor:
    """Return the points where the rays from the clean image through `points` leave the ball."""
    return clean + into_ball(eps * unit(points - clean), eps)


def _features(vlm: SmoothedVLM, pixels: Tensor, n: int) -> Array:
    """Return features [n, D] of one image [1, 3, S, S] under fresh noise."""
    with torch.no_grad():
        return vlm.noisy_features(pixels, n)[0].double().cpu().numpy()


def worst(findings: Sequence[Finding]) -> Finding | None:
    """Return the finding with the least room above its bound, or None when there is none."""
    return min(findings, key=lambda finding: finding.lowest - finding.bound, default=None)

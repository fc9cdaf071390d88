"""Audits where the noise is chosen for each image: its choice is attacked, and the answer at the level chosen (T22)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from robustvlm.certify.claims import Materials, Quantity
from robustvlm.certify.claims.local_noise import noise_audited
from robustvlm.certify.local_noise import LocalNoise
from robustvlm.commands.certify.audit_search import Effort, Finding, Target, audit_image
from robustvlm.defenses import SmoothedVLM

CHOICE = "choice of the noise: "
"""What the kind of a start begins with where the choice of the noise level was attacked."""


def audit_chosen(
    at_level: Callable[[float], SmoothedVLM],
    target: Target,
    effort: Effort,
    *,
    noise: LocalNoise,
    row: Mapping[str, Any],
    sigma: float,
    materials: Materials,
    alpha: float,
    seed: int,
) -> list[Finding]:
    """Attack both parts of a certificate, at alpha / 2 each: that the level stays, and that the answer there does.

    Args:
        at_level: gives the smoothed model of a noise level. target: the answer at the chosen level.
        row: of the results; sigma: the level that was chosen for its image.
    """
    choice = noise_audited(noise, row, materials, sigma)

    def claimed(*_: object) -> Quantity:
        return choice

    voted = audit_image(at_level(noise.at), replace(target, claim=claimed), effort, alpha=0.5 * alpha, seed=seed)
    answered = audit_image(at_level(sigma), target, effort, alpha=0.5 * alpha, seed=seed)
    return [one.model_copy(update={"start": CHOICE + one.start}) for one in voted] + answered

"""Findings about the evaluation itself: signs that a number should not be believed, each in a plain sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from robustvlm.attacks import FAILED, FOOLED, PGD, LaneAttack, Probe, ThreatModel
from robustvlm.errors import UserError
from robustvlm.runs.results import AttackFact, CleanFact
from robustvlm.runs.summary import Check

# Cross-entropy gradients of a few very sure images underflow to zero in any model; of many, they are masked.
_MANY_ZERO_GRADIENTS = 0.1
_BALL_SLACK = 1e-6


def require_independent_rows(found: Probe, model: str) -> None:
    """Refuse a model that answers for the batch instead of the image: its results would depend on the batching."""
    if found.coupled:
        raise UserError(
            f"the output of model '{model}' for one image depends on the other images in its batch (a logit moved by "
            f"{found.batch_change:.2g} standard deviations when only the neighbours changed): use --lanes 1, or take "
            "out what works across the batch, such as batch normalisation in training mode"
        )


def fit_for(attack: LaneAttack, found: Probe) -> LaneAttack:
    """Return the attack without shortcuts that only hold for deterministic models, if the model is random."""
    if found.random and isinstance(attack, PGD):
        return dataclasses.replace(attack, detect_cycles=False)
    return attack


def of_probe(found: Probe) -> list[Check]:
    """Return what the first questions to the model showed."""
    return [_finite(found), _repeatable(found), _independent(found), _gradients(found)]


def _finite(found: Probe) -> Check:
    if found.finite:
        return Check(name="finite output", level="ok", message="All logits of the first images are finite.")
    message = "The model returned NaN or infinite logits for some of the first images; those images count as failed."
    return Check(name="finite output", level="fault", message=message)


def _repeatable(found: Probe) -> Check:
    if found.random:
        message = (
            f"The model is random: asked twice, its logits moved by {found.repeat_change:.2g} standard deviations. "
            "A success here may be one lucky draw, and plain gradients are noisy: read the rates as a first look."
        )
        return Check(name="repeatable output", level="warning", message=message)
    message = "Asked twice, the model gave the same logits" + (
        " to the bit." if found.repeat_change == 0 else " up to rounding."
    )
    return Check(name="repeatable output", level="ok", message=message)


def _independent(found: Probe) -> Check:
    return Check(
        name="independent images",
        level="ok" if not found.random else "note",
        message="The logits of an image do not depend on the other images in its batch."
        if not found.random
        else "Whether images of one batch influence each other cannot be told for a random model.",
    )


def _gradients(found: Probe) -> Check:
    share = found.zero_gradients
    if share > _MANY_ZERO_GRADIENTS:
        message = (
            f"The cross-entropy gradient is exactly zero for {share:.0%} of the first images: gradient attacks are "
            "blind there, and robustness found this way may be gradient masking. Try --attack apgd-dlr or apgd-t."
        )
        return Check(name="useful gradients", level="warning", message=message)
    return Check(name="useful gradients", level="ok", message="Cross-entropy gradients reach the pixels.")


def of_results(
    clean: Sequence[CleanFact],
    found: Sequence[AttackFact],
    *,
    threats: Sequence[ThreatModel],
    attacks: Sequence[LaneAttack],
    n_classes: int,
) -> list[Check]:
    """Return what the finished rows show."""
    failed = sum(fact.outcome == FAILED for fact in found) + sum(fact.prediction < 0 for fact in clean)
    checks = [_inside_ball(found, threats)]
    if failed:
        message = (
            f"{failed} answers could not be had (output not finite, or the image was lost): not counted as robust."
        )
        checks.append(Check(name="failed images", level="fault", message=message))
    for attack in attacks:
        fallback = attack.objective.fallback(n_classes)
        if fallback:
            checks.append(Check(name=f"objective of {attack.name}", level="note", message=fallback + "."))
    if not any(fact.correct for fact in clean):
        message = "No image was classified right before the attack, so there was nothing to attack and no success rate."
        checks.append(Check(name="something to attack", level="fault", message=message))
    return checks


def _inside_ball(found: Sequence[AttackFact], threats: Sequence[ThreatModel]) -> Check:
    """Every recorded perturbation, measured in float64, must lie in its ball."""
    norms = {threat.eps: threat.norm for threat in threats}
    outside = [
        fact
        for fact in found
        if fact.outcome == FOOLED
        and (fact.linf if norms[fact.eps] == "Linf" else fact.l2) > fact.eps * (1 + _BALL_SLACK)
    ]
    if outside:
        message = f"{len(outside)} adversarial images lie outside their ball, a fault of this program: discard the run."
        return Check(name="inside the ball", level="fault", message=message)
    return Check(
        name="inside the ball",
        level="ok",
        message="Every adversarial image, measured in float64, lies in its ball and in [0, 1].",
    )

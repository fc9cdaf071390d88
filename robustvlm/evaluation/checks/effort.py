"""What extra attacks on a small sample showed: more effort must find more, and a huge radius must find everything."""

from __future__ import annotations

from collections.abc import Sequence

from robustvlm.evaluation.checks.model import sign_test
from robustvlm.runs.summary import Check

# Beyond the noise between two runs on the same images: seven images against none.
_P_VALUE = 0.01
# A short gradient attack in a huge ball may leave an image of a sound model now and then, but no such share.
_MISSED_SHARE = 0.25


def more_effort(name: str, less: Sequence[bool], more: Sequence[bool], *, words: tuple[str, str]) -> Check:
    """Compare successes on the same images with less and with more effort; `words` says what each effort is.

    Example:
        >>> more_effort("more steps", [True] * 8, [False] * 8, words=("10 steps", "20 steps")).level
        'warning'
    """
    lost = sum(a and not b for a, b in zip(less, more, strict=True))
    gained = sum(b and not a for a, b in zip(less, more, strict=True))
    counts = f"fresh attacks on {len(less)} images fooled {sum(less)} with {words[0]} and {sum(more)} with {words[1]}"
    if lost > gained and sign_test(lost, gained) < _P_VALUE:
        message = (
            f"More effort finds less: {counts}. What works with {words[0]} must work with {words[1]} too, so "
            "the model's gradients mislead the attack (masking), or its step size does not fit: do not trust the "
            "robust accuracy, and look for parts that saturate, round or switch."
        )
        return Check(name=name, level="warning", message=message)
    return Check(name=name, level="ok", message=f"More effort is not weaker: {counts}.")


def noise_wins(gradient: Sequence[bool], noise: Sequence[bool], *, draws: int) -> Check:
    """Compare an attack with pure noise of twice its radius on the same images."""
    only_noise = sum(b and not a for a, b in zip(gradient, noise, strict=True))
    only_gradient = sum(a and not b for a, b in zip(gradient, noise, strict=True))
    counts = (
        f"of {len(noise)} images, {sum(noise)} fell to the best of {draws} random points at twice the radius, "
        f"{sum(gradient)} to the gradient attack"
    )
    name = "search at random"
    if only_noise > only_gradient and sign_test(only_noise, only_gradient) < _P_VALUE:
        message = (
            f"Noise does better than gradients: {counts}. The gradients are masked, and the robust accuracy is an "
            "artefact of the attack: add --attack square."
        )
        return Check(name=name, level="warning", message=message)
    return Check(name=name, level="ok", message=f"Noise does no better than gradients: {counts}.")


def huge_radius(gradient: Sequence[bool], plain: Sequence[bool], *, radius: str) -> Check:
    """Judge an attack in a ball so large that a plain grey image lies in it; nothing can be robust there.

    Args:
        gradient: images that a short gradient attack fooled; plain: those that grey, black, white and random images,
            or other images of the sample, fooled.
    """
    name, count = "huge radius", len(gradient)
    held = sum(not (a or b) for a, b in zip(gradient, plain, strict=True))
    missed = sum(b and not a for a, b in zip(gradient, plain, strict=True))
    if held:
        message = (
            f"At {radius}, where any image can be turned into plain grey, {held} of {count} images still look robust. "
            "No classifier that looks at the image can be robust there: the attack is blind, or the output hardly "
            "depends on the input."
        )
        return Check(name=name, level="warning", message=message)
    if missed > _MISSED_SHARE * count:
        message = (
            f"At {radius} a short gradient attack missed {missed} of {count} images that plain grey or random images "
            "fool: the gradients are masked, and the robust accuracy is an artefact of the attack."
        )
        return Check(name=name, level="warning", message=message)
    message = f"At {radius}, where nothing can be robust, all {count} images fell."
    return Check(name=name, level="ok", message=message)


def rounding(fooled: int, survived: int) -> Check | None:
    """Say which share of the adversarial images still works when it is saved with 8 bits a channel."""
    if not fooled:
        return None
    message = f"Rounded to 8 bits, {survived} of {fooled} adversarial images of the sample still fool the model"
    if survived < fooled:
        message += ": saved as PNG, the others are lost"
    return Check(name="rounding to 8 bits", level="note", message=message + ".")


def second_look(claimed: int, upheld: int, *, why: str) -> Check | None:
    """Say how many successes that an attack saw in its own passes did not stand up to a final look."""
    if not claimed:
        return None
    message = (
        f"{claimed - upheld} of {claimed} successes that {why} showed in the sample did not stand up to the final "
        "look, and were not counted."
        if upheld < claimed
        else f"All {claimed} successes that {why} showed in the sample stood up to the final look."
    )
    return Check(name="unconfirmed successes", level="note", message=message)

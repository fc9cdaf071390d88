"""The first questions to a model, and what its answers show: its output, its draws, its gradients, its input range."""

from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor

from robustvlm.attacks import LaneAttack, Oracle, Probe
from robustvlm.attacks.honesty import Sanity
from robustvlm.attacks.probe import ask_first
from robustvlm.errors import UserError, setting
from robustvlm.runs.records import Check
from robustvlm.stats import rate, worth_of

# The first questions to a model, and the note that a run makes where memory did not suffice for all of its lanes


def ask(oracle: Oracle, images: Tensor, label: Tensor, *, model: str) -> tuple[Probe, list[Check]]:
    """Probe a model on images [L, 3, H, W] and labels [L]; the notes say if fewer are asked at once, and why.

    Raises:
        UserError: the model fails on such a batch, or gives no gradient.

    Example:
        >>> import torch
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> found, notes = ask(oracle, torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), model="linear")
        >>> found.finite, notes
        (True, [])
    """
    found = ask_first(oracle, images, label, model=f"model '{model}'")
    said = found.fewer_than(len(images))
    if said is None:
        return found, []
    return found, [Check(name="lanes", level="note", message=f"{said[0].upper()}{said[1:]}.")]


def copies(groups: Iterable[Hashable]) -> list[Check]:
    """Say of images in groups that stand and fall together, by `DataSource.group`, that intervals count each once.

    Example:
        >>> copies(["cat/0", "dog/0"])
        []
        >>> copies(["cat", "cat", "dog", "dog"])[0].message.split(":")[0]
        '4 images are worth 2 independent ones, as there are copies of one thing among them'
    """
    known = list(groups)
    if len(set(known)) == len(known):
        return []
    message = (
        f"{len(known):,} images are worth {worth_of(known):,.0f} independent ones, as there are copies of one thing "
        "among them: intervals count each thing once."
    )
    return [Check(name="copies", level="note", message=message)]


def copies_not_told(worth: float) -> Check:
    """Say of images worth fewer, whose ids do not tell which are copies, that intervals are too narrow."""
    message = (
        f"The images are worth {worth:,.0f} independent one{'s' if round(worth) != 1 else ''}, and their ids do not "
        "tell which are copies of one thing: intervals count every image, and are narrow for other images."
    )
    return Check(name="copies", level="note", message=message)


# What the first questions to a model showed: its output, its randomness, its gradients, the range of its input

SANITY_NAMES = ("logits", "gradient against noise", "gradient as stated", "input range")

# Cross-entropy gradients of a few very sure images underflow to zero in any model; of many, they are masked.
_MANY_ZERO_GRADIENTS = 0.1
_MANY_SATURATED = 0.1
# Fewer images than this that tell noise and gradient apart say nothing.
_ENOUGH_IMAGES = 8
# Sound models reach 0.97 and more; dropping a part that weighs as much as all the rest gives 0.7.
_HONEST = 0.85
# Another input range must beat [0, 1] beyond chance, and by this share of the images.
_RANGE_P_VALUE, _RANGE_GAIN = 0.01, 0.2
# Objectives that do not go through a softmax, and so do not saturate.
_UNSATURATED = ("dlr", "margin")


def require_independent_rows(found: Probe, model: str) -> None:
    """Refuse a model that answers for the batch instead of the image: its results would depend on the batching."""
    if found.coupled:
        raise UserError(
            f"the output of model '{model}' for one image depends on the other images in its batch (a logit moved by "
            f"{found.batch_change:.2g} standard deviations when only the neighbours changed): use "
            f"{setting('lanes', 1)}, or take out what works across the batch, such as batch normalisation in training "
            "mode"
        )


def fit_for(attack: LaneAttack, found: Probe) -> LaneAttack:
    """Return the attack without shortcuts that only hold for deterministic models, if the model is random."""
    return attack.for_random_model() if found.random else attack


def of_probe(found: Probe, oracle: Oracle | None = None) -> list[Check]:
    """Return what the probe showed; the oracle says how a run averages over, and judges, a random model."""
    return [_finite(found), _repeatable(found, oracle), _independent(found), _gradients(found)]


def of_sanity(found: Sanity, *, attacks: Sequence[LaneAttack], zero_gradients: float, declared: bool) -> list[Check]:
    """Return what the comparison of words and deeds of the model showed.

    Args:
        attacks: the run's attacks.
        zero_gradients: share of images whose gradient is exactly zero, as the probe found.
        declared: parts of the model are declared to have no gradient, so that theirs is known to be made up.
    """
    checks = [_logits(found, attacks)] if found.classes else []
    if zero_gradients <= _MANY_ZERO_GRADIENTS:  # otherwise the lack of a gradient explains all that follows
        checks += [_climbing(found), *_honest(found, declared)]
    return checks + _input_range(found)


def _finite(found: Probe) -> Check:
    if found.finite:
        return Check(name="finite output", level="ok", message="All logits of the first images are finite.")
    message = "The model returned NaN or infinite logits for some of the first images; those images count as failed."
    return Check(name="finite output", level="fault", message=message)


def _repeatable(found: Probe, oracle: Oracle | None) -> Check:
    name = "repeatable output"
    if not found.random:
        how = "to the bit" if found.repeat_change == 0 else "up to rounding"
        return Check(name=name, level="ok", message=f"Asked twice, the model gave the same logits {how}.")
    moved = (
        f"The model is random: asked twice, its logits moved by {found.repeat_change:.2g} standard deviations of the "
        "logits."
        if found.shown_random
        else "The model is random by the word of one of its parts, though the first images do not show it."
    )
    if oracle is not None and oracle.eot > 1 and oracle.draws > 1:
        more = f", and is to hold in the majority of {oracle.upholding} more" if oracle.upholding else ""
        message = (
            f"{moved} Gradients are averaged over {oracle.eot} draws, and every success is judged on {oracle.draws} "
            f"fresh draws by majority{more}."
        )
        return Check(name=name, level="note", message=message)
    message = (
        f"{moved} A success here may be one lucky draw, and plain gradients are noisy: average over the model's draws "
        "with --eot 16, and judge by several with --draws 9."
    )
    return Check(name=name, level="warning", message=message)


def _independent(found: Probe) -> Check:
    return Check(
        name="independent images",
        level="ok" if not found.shown_random else "note",
        message="The logits of an image do not depend on the other images in its batch."
        if not found.shown_random
        else "Whether images of one batch influence each other cannot be told for a random model.",
    )


def _gradients(found: Probe) -> Check:
    share = found.zero_gradients
    if share > _MANY_ZERO_GRADIENTS:
        message = (
            f"The cross-entropy gradient is exactly zero for {share:.0%} of the first images: gradient attacks are "
            "blind there, and robustness found this way may be gradient masking. Look for rounding or thresholds in "
            "the model; try --attack apgd-dlr,apgd-t, and square, which needs no gradient."
        )
        return Check(name="useful gradients", level="warning", message=message)
    return Check(name="useful gradients", level="ok", message="Cross-entropy gradients reach the pixels.")


def _logits(found: Sanity, attacks: Sequence[LaneAttack]) -> Check:
    name = SANITY_NAMES[0]
    if found.probabilities:
        message = (
            "The model returns probabilities (in [0, 1], sum 1) instead of logits: a second softmax flattens every "
            "loss, and sure answers have no gradient left. Leave out the model's softmax."
        )
        return Check(name=name, level="warning", message=message)
    if found.saturated > _MANY_SATURATED:
        spared = [attack.name for attack in attacks if attack.objective.name.removesuffix("-t") in _UNSATURATED]
        message = (
            f"For {found.saturated:.0%} of the first images the softmax probability is exactly 1 in float32: "
            "the cross-entropy is flat there, and its gradient is lost to rounding. "
        ) + (
            f"The objective of {', '.join(spared)} does not saturate, so the worst case is sound."
            if spared
            else "Add an attack whose objective does not saturate: --attack apgd-dlr,apgd-t."
        )
        return Check(name=name, level="note" if spared else "warning", message=message)
    return Check(name=name, level="ok", message="The model returns logits, and the softmax of them is not saturated.")


def _climbing(found: Sanity) -> Check:
    name, told = SANITY_NAMES[1], found.noise_wins + found.gradient_wins
    if told < _ENOUGH_IMAGES:
        message = f"Too few images ({told}) to compare a gradient step with random noise."
        return Check(name=name, level="note", message=message)
    if 2 * found.noise_wins > told:
        message = (
            f"On {found.noise_wins} of {told} images random noise raised the attacker's loss more than a gradient step "
            "of the same size: the gradient does not point to where the loss rises (masked or shattered gradients), "
            "so gradient attacks say little. Add --attack square, and attack the model without the part that hides "
            "the gradient."
        )
        return Check(name=name, level="warning", message=message)
    message = f"A gradient step raised the loss more than random noise of its size on {found.gradient_wins} of {told}."
    return Check(name=name, level="ok", message=message)


def _honest(found: Sanity, declared: bool) -> list[Check]:
    name = SANITY_NAMES[2]
    if found.derivative is None:
        return []
    if found.derivative >= _HONEST:
        message = f"The output changes as the gradient foretells (correlation {found.derivative:.2f})."
        return [Check(name=name, level="ok", message=message)]
    seen = f"Changes of the output agree badly with what the gradient foretells (correlation {found.derivative:.2f})"
    if declared:
        message = f"{seen}, as is to be expected of a model with parts that are declared to have no gradient."
        return [Check(name=name, level="note", message=message)]
    message = (
        f"{seen}: a part of the model hides its gradient or returns a made-up one (detach, no_grad, rounding, a custom "
        "backward pass), so the attack does not see the whole model. Let the gradient through, or declare the part "
        "with `differentiable = False`."
    )
    return [Check(name=name, level="warning", message=message)]


def _input_range(found: Sanity) -> list[Check]:
    if found.right is None or not found.ranges:
        return []
    name, (gain, loss) = max(found.ranges.items(), key=lambda item: item[1][0] - item[1][1])
    if gain - loss >= _RANGE_GAIN * found.images and sign_test(gain, loss) < _RANGE_P_VALUE:
        guessing = rate(found.right, found.images).low <= 1 / found.classes
        message = (
            f"The model seems to expect another input range: of {found.images} images {found.right} are right with "
            f"pixels in [0, 1], and {found.right + gain - loss} with pixels {_as_range(name)}. Put the scaling and "
            "normalisation into the model: it is given pixels in [0, 1]."
        )
        return [Check(name=SANITY_NAMES[3], level="fault" if guessing else "warning", message=message)]
    message = "No other input range gives more right answers than pixels in [0, 1]."
    return [Check(name=SANITY_NAMES[3], level="ok", message=message)]


def _as_range(name: str) -> str:
    return f"in {name}" if name.startswith("[") else name


def sign_test(wins: int, losses: int) -> float:
    """Return the chance of at least so many wins if wins and losses were a fair coin (one-sided exact McNemar).

    Example:
        >>> sign_test(3, 0)
        0.125
    """
    from scipy.special import bdtrc

    return float(bdtrc(wins - 1, wins + losses, 0.5))

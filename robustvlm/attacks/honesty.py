"""Whether a model shows an attack the way: useless or made-up gradients, and stand-ins for parts that have none.

Attacks climb along gradients of logits. Each question here compares what the model tells an attack with what the model
does, on a few images and with a few passes, before any attack is made.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.attacks.goals import Case, Goal
from robustvlm.attacks.objectives import objective
from robustvlm.attacks.oracle import Oracle
from robustvlm.attacks.threat import ThreatModel, l2_norms, per_image
from robustvlm.core.seeds import generator, row_sums
from robustvlm.errors import UserError

# Signs that the model would mislead an attack: squashed outputs, useless or made-up gradients, a wrong input range

MOST_IMAGES = 32

# The step that is compared with noise: that of a usual attack, even where the radius of the run is huge.
_LARGEST_STEP = 8 / 255
_NOISE_DRAWS = 3
# For differences the pixels of an image of 16 x 16 move by this much: enough for float32, too little for curvature to
# matter. Curvature is met along the whole way, so the pixels of larger images move less, and the image as far.
_NUDGE, _NUDGED_VALUES = 1e-3, 3 * 16 * 16
_NUDGES = 3
# A correlation below this is measured again with larger nudges: models that compute in half precision move in steps.
_CLEAR, _LARGER = 0.95, 4.0
# A logit is a sum of many products; its last bits, up to this multiple of the float's spacing, are rounding.
_ROUNDING = 32
_PROBABILITY_SLACK = 1e-3

Loss = Callable[[Tensor], Tensor]

# Input ranges that models are fed with where normalisation was forgotten, or done twice.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "[0, 255]": lambda x: x * 255,
    "[-1, 1]": lambda x: x * 2 - 1,
    "normalised by mean and standard deviation": lambda x: (
        (x - x.new_tensor(_MEAN)[:, None, None]) / x.new_tensor(_STD)[:, None, None]
    ),
}


@dataclass(frozen=True)
class Sanity:
    """What a few passes over the first images say about outputs, gradients and input range.

    Args:
        images: how many images were asked about.
        probabilities: the outputs are probabilities (in [0, 1], sum 1) and not logits.
        saturated: share of images whose largest softmax probability is exactly 1 in float32.
        noise_wins: images on which random noise raised the attacker's loss more than a gradient step of that size.
        gradient_wins: images on which the gradient step raised it more.
        derivative: correlation between changes of the output and the changes that the gradient foretells; None where
            that cannot be measured (a random model, changes below rounding).
        right: images classified right as they are; None for goals without labels.
        ranges: per other input range, the images right only there, and those right only in [0, 1].
        classes: number of classes told apart.
    """

    images: int
    probabilities: bool
    saturated: float
    noise_wins: int
    gradient_wins: int
    derivative: float | None
    right: int | None
    ranges: dict[str, tuple[int, int]]
    classes: int


def inspect_model(
    oracle: Oracle, images: Tensor, goal: Goal, case: Case, threat: ThreatModel, *, random: bool, classes: int | None
) -> Sanity:
    """Ask the model about at most 32 images [B, 3, H, W] in [0, 1].

    Costs 16 forward passes and a backward one per image; up to 18 more where images are large and the gradient is in
    doubt.

    Args:
        random: the model answers differently when asked again.
        classes: number of leading output columns that are logits of the classes of `case.label`; None when the output
            is something else, such as features.

    Example:
        >>> from robustvlm.attacks.goals import Misclassify
        >>> oracle = Oracle(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)))
        >>> x, case = torch.rand(8, 3, 2, 2), Case(torch.zeros(8, dtype=torch.int64))
        >>> found = inspect_model(oracle, x, Misclassify(), case, ThreatModel("Linf", 0.01), random=False, classes=3)
        >>> found.probabilities, found.noise_wins, found.derivative > 0.9
        (False, 0, True)
    """
    count = min(len(images), MOST_IMAGES)
    x = images[:count].to(oracle.device, oracle.dtype)
    case = case.to(oracle.device, oracle.dtype).rows(torch.arange(count, device=oracle.device))
    if goal.still_at_image:
        x = _step(x, torch.randn(x.shape, generator=generator(0, "sanity", "start")).to(x), threat)
    # Room on both sides, so that no nudge leaves [0, 1], where a model may clip.
    x = x * (1 - 2 * _NUDGE) + _NUDGE
    _, _, grad = oracle.look(x, goal, objective("margin"), case)

    def loss(points: Tensor) -> Tensor:
        """Return the attacker's loss in full precision, [B]; the mean over as many draws as a gradient's."""
        each = [goal.loss(oracle.confirm(points), objective("margin"), case) for _ in range(oracle.eot)]
        return torch.stack(each).double().mean(0)

    noise_wins, gradient_wins = _race(loss, x, grad, threat)
    logits = None if classes is None else oracle.confirm(x)[:, :classes]
    right, ranges = (None, {}) if logits is None else _ranges(oracle, x, logits, case.label)
    return Sanity(
        images=count,
        probabilities=logits is not None and _are_probabilities(logits),
        saturated=0.0 if logits is None else (logits.float().softmax(1).amax(1) == 1).double().mean().item(),
        noise_wins=noise_wins,
        gradient_wins=gradient_wins,
        derivative=None if random else _derivative(loss, x, grad, oracle),
        right=right,
        ranges=ranges,
        classes=classes or 0,
    )


def _race(loss: Loss, x: Tensor, grad: Tensor, threat: ThreatModel) -> tuple[int, int]:
    """Compare a gradient step with the best of three random steps of its size; return how many images each one won."""
    draws = generator(0, "sanity", "race")
    climbed = loss(_step(x, grad, threat))
    noise = [torch.randn(x.shape, generator=draws).to(x) for _ in range(_NOISE_DRAWS)]
    strayed = torch.stack([loss(_step(x, one, threat)) for one in noise]).amax(0)
    return int((strayed > climbed).sum()), int((climbed > strayed).sum())


def _step(x: Tensor, direction: Tensor, threat: ThreatModel) -> Tensor:
    """Return x after one step of the threat's size, or of a usual attack's where that is smaller, in [0, 1]."""
    if threat.norm == "Linf":
        move = min(threat.eps, _LARGEST_STEP) * direction.sign()
    else:
        length = min(threat.eps, _LARGEST_STEP * x[0].numel() ** 0.5)
        # The floor is that of the attacks: they do not move along shorter gradients either.
        move = length * direction / per_image(l2_norms(direction).clamp_min(1e-12), direction)
    return (x + move).clamp(0, 1)


def _derivative(loss: Loss, x: Tensor, grad: Tensor, oracle: Oracle) -> float | None:
    """Correlate differences of the loss along random directions with what the gradient says they are.

    A part of the model whose gradient is cut, or made up, moves the output in ways the gradient does not foretell, at
    any distance. Curvature spoils large nudges only, and rounding inside the model small ones only, so the best
    correlation counts.
    """
    size, found = nudge_size(x[0].numel()), None
    while True:
        now = _correlation(loss, x, grad, oracle, size)
        found = max((value for value in (found, now) if value is not None), default=None)
        if size >= _NUDGE or (found is not None and found >= _CLEAR):
            return found
        size = min(_NUDGE, _LARGER * size)


def nudge_size(values: int) -> float:
    """Return by how much every pixel of an image of so many values moves when a derivative is measured.

    Example:
        >>> [round(nudge_size(3 * side * side), 6) for side in (8, 16, 224)]
        [0.001, 0.001, 7.1e-05]
    """
    return min(_NUDGE, _NUDGE * (_NUDGED_VALUES / values) ** 0.5)


def _correlation(loss: Loss, x: Tensor, grad: Tensor, oracle: Oracle, size: float) -> float | None:
    """Return the correlation at one size of nudges; None where all changes are below rounding."""
    draws = generator(0, "sanity", "derivative")
    measured, foretold = [], []
    for _ in range(_NUDGES):
        nudge = (size * (2 * torch.randint(0, 2, x.shape, generator=draws) - 1)).to(x)
        measured.append((loss(x + nudge) - loss(x - nudge)) / 2)
        foretold.append(row_sums(nudge.double() * grad.double()))
    seen, told = torch.stack(measured), torch.stack(foretold)
    rounding = _ROUNDING * torch.finfo(oracle.dtype).eps * oracle.confirm(x).abs().amax(1).double()
    length = (seen.square() + told.square()).mean(0).sqrt()
    clear = length > rounding
    if not clear.any():
        return None
    # Every image weighs the same, however steep the model is there.
    seen, told = (seen / length)[:, clear], (told / length)[:, clear]
    norms = (seen.square().sum() * told.square().sum()).sqrt()
    return ((seen * told).sum() / norms.clamp_min(1e-12)).item()


def _are_probabilities(logits: Tensor) -> bool:
    wide = logits.double()
    sums_to_one = ((wide.sum(1) - 1).abs() <= _PROBABILITY_SLACK).all()
    return bool(sums_to_one & (wide >= -1e-6).all() & (wide <= 1 + 1e-6).all())


def _ranges(oracle: Oracle, x: Tensor, logits: Tensor, label: Tensor) -> tuple[int | None, dict[str, tuple[int, int]]]:
    """Count the right answers on images as they are, and where rescaled images change right and wrong."""
    if (label < 0).any() or (label >= logits.shape[1]).any():
        return None, {}
    right = logits.argmax(1) == label
    changes = {}
    for name, rescale in RANGES.items():
        other = oracle.confirm(rescale(x))[:, : logits.shape[1]].argmax(1) == label
        if len(label[other].unique()) < 2:  # always the same answer is right on one class by luck
            other = torch.zeros_like(other)
        changes[name] = (int((other & ~right).sum()), int((right & ~other).sum()))
    return int(right.sum()), changes


# Gradients through parts that have none: the exact forward pass, and a stand-in for the backward one

Surrogate = Callable[..., Tensor]


def exactly(value: Tensor, stand_in: Tensor) -> Tensor:
    """Return `value` to the bit, with the gradient of `stand_in` of the same shape (also through a second backward).

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> y = exactly(x.round(), x.sin())
        >>> y.tolist(), bool((torch.autograd.grad(y.sum(), x)[0] == x.cos()).all())
        ([0.0, 1.0], True)
    """
    return _Exactly.apply(stand_in.to(value.dtype), value.detach())


class _Exactly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, value: Tensor) -> Tensor:
        del ctx, stand_in
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


def straight_through(function: Callable[..., Tensor], x: Tensor, surrogate: Surrogate | None = None) -> Tensor:
    """Return `function(x)` exactly; its gradient is that of `surrogate(x)`, or the identity's without one.

    Source: backward pass differentiable approximation, Athalye et al. 2018 (arXiv 1802.00420, section 4.1).

    Raises:
        UserError: the stand-in has another shape than the value.

    Example:
        >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> y = straight_through(torch.round, x)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """
    with torch.no_grad():
        value = function(x)
    if not torch.is_grad_enabled() or not x.requires_grad:
        return value
    stand_in = x if surrogate is None else surrogate(x)
    if stand_in.shape != value.shape:
        what = "its input" if surrogate is None else "what its surrogate returns"
        raise UserError(
            f"a part without gradient returns {list(value.shape)}, but {what} is {list(stand_in.shape)}: "
            "give it a function `surrogate` that returns the shape of its output"
        )
    return exactly(value, stand_in)


def open_gradients(model: nn.Module) -> list[str]:
    """Give every part of `model` that has an attribute `differentiable = False` a backward pass; return sentences.

    The gradient is that of the part's attribute `surrogate`, a differentiable function of the same input, or the
    identity where it has none. Values stay as they are. The parts are changed in place; a second call finds nothing
    more to change but says the same.

    Example:
        >>> class Quantise(nn.Module):
        ...     differentiable = False
        ...     def forward(self, x): return (x * 7).round() / 7
        >>> open_gradients(nn.Sequential(Quantise(), nn.Flatten()))
        ["part '0' (Quantise) has no gradient: attacks go straight through it, as if it were the identity"]
    """
    said = []
    for name, part in model.named_modules():
        if getattr(part, "differentiable", True):
            continue
        surrogate: Surrogate | None = getattr(part, "surrogate", None)
        if surrogate is not None and not callable(surrogate):
            raise UserError(f"the surrogate of part '{name or 'model'}' must be a function, got {surrogate!r}")
        if not isinstance(part.forward, _Opened):
            part.forward = _Opened(part.forward, surrogate)
        how = (
            "attacks go straight through it, as if it were the identity"
            if surrogate is None
            else "attacks use the gradient of the surrogate that it gives"
        )
        said.append(f"part '{name or 'model'}' ({type(part).__name__}) has no gradient: {how}")
    return said


def attack_remarks(model: nn.Module) -> list[str]:
    """Return what parts of `model` have to say to whoever attacks it (their attribute `attack_remark`), each once.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.attack_remark = "gradients tell little of it"
        >>> attack_remarks(nn.Sequential(layer, nn.ReLU()))
        ['gradients tell little of it']
    """
    said = (getattr(part, "attack_remark", None) for part in model.modules())
    return list(dict.fromkeys(remark for remark in said if remark))


@contextlib.contextmanager
def opened_gradients(model: nn.Module) -> Iterator[list[str]]:
    """Open the gradients of a caller's module as `open_gradients` does, and leave all of its parts as they were.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> model[0].differentiable = False
        >>> with opened_gradients(model) as said:
        ...     len(said), "forward" in vars(model[0])
        (1, True)
        >>> "forward" in vars(model[0])
        False
    """
    before = [(part, vars(part).get("forward")) for part in model.modules()]
    try:
        yield open_gradients(model)
    finally:
        for part, forward in before:
            if forward is None:
                vars(part).pop("forward", None)
            else:
                part.forward = forward


class _Opened:
    """A part's forward pass with a backward pass of another function."""

    def __init__(self, function: Callable[..., Tensor], surrogate: Surrogate | None) -> None:
        self.function, self.surrogate = function, surrogate

    def __call__(self, x: Tensor, *others: object) -> Tensor:
        """Call the part with an input and perhaps more, such as a noise level, which its surrogate is given too."""
        surrogate = self.surrogate
        stand_in = None if surrogate is None else lambda y: surrogate(y, *others)
        return straight_through(lambda y: self.function(y, *others), x, stand_in)

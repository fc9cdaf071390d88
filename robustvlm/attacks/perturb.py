"""Tensors in, tensors out: attacks on a batch of images of any module, without a run and its folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustvlm.attacks.base import FAILED, FOOLED, Job, LaneAttack, Result
from robustvlm.attacks.catalog import PLANS, Attack, by_gradients, parse_attacks, recommended_eot
from robustvlm.attacks.engine import LaneEngine
from robustvlm.attacks.external import ExternalAttack, require_fit, require_norm
from robustvlm.attacks.external_engine import ExternalEngine
from robustvlm.attacks.goals import Case, Goal, Known, Targeted, read_goals
from robustvlm.attacks.honesty import attack_remarks, opened_gradients
from robustvlm.attacks.oracle import EOT_IF_RANDOM, Answer, Oracle
from robustvlm.attacks.probe import Probe, ask_first, settle_draws
from robustvlm.attacks.tensors import (
    AskedModel,
    Unperturbed,
    as_images,
    as_labels,
    ask_unperturbed,
    chosen_device,
    image_ids,
)
from robustvlm.attacks.threat import ThreatModel, parse_eps, parse_norm
from robustvlm.core.batches import SteadySizes, smallest
from robustvlm.errors import UserError, arguments_named, nearest, setting
from robustvlm.stats import Rate, rate

CLEAN = "clean"
"""Stands in `by` for images at which the goal is reached as they are."""
_MOST = {"steps": 100_000, "restarts": 100_000, "lanes": 65_536, "eot": 10_000, "draws": 10_000}


@dataclass(frozen=True, eq=False)
class Perturbed:
    """What attacks found, one entry for each image, in the order they came.

    Attributes:
        images: [N, C, H, W] on the device of the images given, in float32 (float64 for a model in float64): the first
            point that reached the goal, else the point nearest to it. Every one lies in the ball around its image and
            in [0, 1] exactly, and was judged by a forward pass in full precision.
        fooled: the goal is reached at that point; bool [N].
        by: the attack that did it; "clean" where the goal is reached without any, None where it is not reached.
        margins: distance from the goal at that point, in the units of the model's logits: negative where it is reached
            (for a random model the largest over its draws); float64 [N].
        predictions: the class there, -1 for a rejected image or a model without classes; int64 [N].
        passes: forward and backward passes spent on the image; int64 [N].
        failed: the model gave NaN or infinite outputs in the ball, so that nothing is known; bool [N].
        threat: the ball. remarks: what a reader of these results has to know, a sentence each.
    """

    images: Tensor = field(repr=False)
    fooled: Tensor
    by: tuple[str | None, ...]
    margins: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)
    passes: Tensor = field(repr=False)
    failed: Tensor = field(repr=False)
    threat: ThreatModel
    remarks: tuple[str, ...] = ()

    @property
    def robust_accuracy(self) -> Rate:
        """Share of images that held against all attacks, with its exact interval; failed ones do not count as held."""
        return rate(int((~self.fooled & ~self.failed).sum()), len(self.fooled))


@arguments_named()
def perturb(
    model: Callable[..., Any],
    images: Tensor,
    labels: Tensor | Sequence[int] | None = None,
    *,
    eps: float | str,
    attack: str | Sequence[LaneAttack] = "apgd-ce,apgd-t",
    norm: str = "Linf",
    goal: str | Goal = "misclassify",
    steps: int | None = None,
    restarts: int | None = None,
    stop_at_success: bool = True,
    lanes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: str | None = None,
    eot: int | None = None,
    draws: int | None = None,
    ids: Sequence[str] | None = None,
    brisk: bool = False,
    known: Probe | None = None,
) -> Perturbed:
    """Attack images of any model; each goes from one attack to the next until one succeeds.

    The model is used in evaluation mode with frozen weights and left as it was: modes, gradients, dtype, device. Draws
    follow from `seed`, the image and the attack, so an image's answer depends on nothing else in the batch; a random
    model's own draws follow from `seed` and the pass, so its answers depend on the other images and on `lanes` as well.

    Args:
        model: any module or function from pixels [B, C, H, W] in [0, 1] to logits [B, K] (or an output with `.logits`),
            or a classifier of `load_classifier`, also one that may refuse. Random models are recognised: gradients are
            averaged over their draws, and fresh draws judge by majority.
        images: floats [N, C, H, W] in [0, 1]; another precision than the model's is converted first.
        labels: true classes [N]; not needed for goals that do not ask for them.
        eps: radius in pixel units, a number or a text such as "2/255".
        attack: attacks or plans by name, as `apgd-ce,apgd-t`, `standard`, `pgd:steps=40`, `torchattacks:PGD`; or
            attacks themselves.
        norm: "Linf" or "L2".
        goal: "misclassify", "targeted:CLASS" (name or number), "deny", "intrude", "feature", or a `Goal`.
        steps: gradient steps of every attack that does not state its own.
        restarts: the same of restarts.
        stop_at_success: leave an image at its first success; else every attack goes on for the lowest margin.
        lanes: images in a batch (default 64, on a GPU 256); the batch is filled up, so that answers do not depend on
            how many images there are: pass fewer for few large images.
        device: "auto" is the model's own; on another one a copy of the model is attacked.
        precision: "fp32", "bf16" for gradients under autocast, "fp64"; default: the model's own, fp32 at least.
        eot: draws of a random model that a gradient is averaged over (10).
        draws: fresh draws of a random model that judge a point (21); where the majority of more than one makes a
            success, that of 101 others has to agree, or the attack goes on.
        ids: names of the images that random draws follow (default: a digest of the pixels); with the ids of a data set
            answers are those of `robustvlm attack` with the same settings, unless the model draws.
        brisk: a point of a random model is judged by no more draws than decide their majority; margins are of those.
        known: what the first questions (`ask_first`) said of this very model in as many lanes, to spare them.

    Raises:
        UserError: an argument that does not fit, or a model that fails or whose rows depend on each other.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
        >>> images = torch.rand(6, 3, 8, 8)
        >>> found = perturb(model, images, model(images).argmax(1), attack="pgd:steps=5", eps="8/255")
        >>> bool(((found.images - images).abs() <= 8 / 255).all()), found.fooled.shape
        (True, torch.Size([6]))
    """
    _whole(steps=steps, restarts=restarts, lanes=lanes, eot=eot, draws=draws)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"{setting('seed')} must be a whole number from 0 to 2^63 - 1, got {seed!r}")
    attacks: list[Attack] = (
        parse_attacks(attack, steps=steps, restarts=restarts) if isinstance(attack, str) else list(attack)
    )
    threat = ThreatModel(parse_norm(norm), _radius(eps))
    for item in attacks:
        if isinstance(item, ExternalAttack):
            require_norm(item, threat.norm)
    pixels = as_images(images)
    asked, wanted = _aim(model, goal)
    place = chosen_device(device, model, images)
    about_classes = not wanted.of_features
    outputs = asked.try_out(pixels, classes=about_classes)
    classes = outputs - bool(getattr(model, "can_reject", False)) if about_classes else None
    for item in attacks:
        if isinstance(item, ExternalAttack):
            require_fit(item, threat, n_classes=classes or outputs, goal=wanted)
    names = _names(ids, pixels)
    label = _labels(labels, len(pixels), classes, wanted)
    with opened_gradients(asked) as stand_ins:
        oracle = Oracle(
            asked,
            device=place,
            precision=precision or ("fp64" if asked.dtype == torch.float64 else "fp32"),
            seed=seed,
            brisk=brisk,
        )
        lanes = lanes or (256 if place.type == "cuda" else 64)
        rows = torch.arange(lanes) % len(pixels)
        found = known or ask_first(oracle, pixels.cpu()[rows], label[rows].clamp_min(0), model="the model")
        if found.coupled:
            raise UserError(
                "the model's output for one image depends on the other images of the batch: pass lanes=1, or take out "
                "what works across the batch, such as batch statistics"
            )
        planned = recommended_eot(attack) if isinstance(attack, str) else 1
        settle_draws(oracle, found, eot=eot, draws=draws, eot_if_random=max(EOT_IF_RANDOM, planned))
        search = _Search(oracle, wanted, threat, found, pixels.cpu().to(oracle.dtype), label, names, seed)
        search.remark(*stand_ins, *attack_remarks(asked), *_remarks(asked, oracle, found, lanes))
        search.remark(*_fallbacks(attacks, None if classes is None else wanted.outcomes(classes)))
        search.look_at_clean(max(getattr(item, "n_targets", None) or 1 for item in attacks))
        for item in attacks:
            search.run(item, stop_at_success=stop_at_success)
        search.confirm()
    return search.result(images.device)


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack (Croce and Hein 2020, arXiv 2003.01690) as a function of model, images and labels.

    The four attacks of the standard version in lanes, the targets being each image's likeliest wrong classes; the same
    as `perturb(..., attack=version)`.

    Args:
        eps: radius of the ball, a number or a text such as "2/255".
        norm: "Linf" or "L2".
        version: "standard", "plus", or "rand" for random models.
        seed: seed of every draw.
        lanes: images in a batch, as `perturb` takes it.
        device: "auto" is the model's own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 3))
        >>> images = torch.rand(2, 3, 4, 4)
        >>> AutoAttack(eps=0.5)(model, images, model(images).argmax(1)).by
        ('apgd-ce', 'apgd-ce')
    """

    eps: float | str
    norm: str = "Linf"
    version: str = "standard"
    seed: int = 0
    lanes: int | None = None
    device: str | torch.device = "auto"

    def __post_init__(self) -> None:
        if self.version not in PLANS:
            raise UserError(f"unknown version '{self.version}': {nearest(self.version, PLANS)}")
        ThreatModel(parse_norm(self.norm), _radius(self.eps))

    def __call__(
        self, model: Callable[..., Any], images: Tensor, labels: Tensor | Sequence[int] | None = None
    ) -> Perturbed:
        """Attack images [N, C, H, W] with labels [N]; see `perturb`."""
        return perturb(
            model,
            images,
            labels,
            eps=self.eps,
            norm=self.norm,
            attack=self.version,
            seed=self.seed,
            lanes=self.lanes,
            device=self.device,
        )


class _Search:
    """The state of one call: for each image the best point so far, and what is known of it."""

    def __init__(
        self,
        oracle: Oracle,
        goal: Goal,
        threat: ThreatModel,
        found: Probe,
        images: Tensor,
        label: Tensor,
        names: Sequence[str],
        seed: int,
    ) -> None:
        self.oracle, self.goal, self.threat, self.found, self.seed = oracle, goal, threat, found, seed
        self.images, self.label, self.names = images, label, names
        count = len(images)
        self.points = images.clone()
        self.fooled, self.failed = torch.zeros(2, count, dtype=torch.bool)
        self.margins = torch.full((count,), float("inf"), dtype=torch.float64)
        self.predictions, self.passes = torch.zeros(2, count, dtype=torch.int64)
        self._sizes: dict[bool, SteadySizes] = {}
        self.by: list[str | None] = [None] * count
        self.targets: list[tuple[int, ...]] = [()] * count
        self.references: list[Tensor | None] = [None] * count
        self.beyond: list[Mapping[int, float]] = [{}] * count
        self.reached = [float("inf")] * count
        self.remarks: list[str] = []

    def remark(self, *sentences: str) -> None:
        """Note sentences for the reader, each as one."""
        self.remarks += [f"{said[0].upper()}{said[1:].rstrip('.')}." for said in sentences]

    def look_at_clean(self, n_targets: int) -> None:
        """Ask about the images as they are, and note what attacks have to know of them."""
        for index, rows in self._batches():
            seen = ask_unperturbed(self.oracle, self.goal, self.images[rows], self.label[rows])
            answer = self._upheld(seen, rows) if self.oracle.upholding else seen.answer
            self._note(index, answer.head(len(index)))
            outputs = seen.output.cpu()
            for row, place in enumerate(index.tolist()):
                self.targets[place] = tuple(self.goal.targets(outputs[row], int(self.label[place]), n_targets))
                self.references[place] = None if seen.reference is None else seen.reference[row].cpu()
        broken = self.failed.nonzero().flatten().tolist()
        if broken:
            raise UserError(f"the model gives NaN or infinite outputs for image {broken[0]}: leave it out")
        self.by = [CLEAN if fooled else None for fooled in self.fooled.tolist()]

    def _upheld(self, seen: Unperturbed, rows: Tensor) -> Answer:
        """Return the answers at the images; those that reach the goal by one majority are asked for once more."""
        reached = seen.answer.reached.nonzero().flatten()
        if not len(reached):
            return seen.answer
        case = Case(self.label[rows], self.label[rows], seen.reference).to(self.oracle.device, self.oracle.dtype)
        again, _ = self.oracle.decide(
            self.images[rows[reached.cpu()]].to(self.oracle.device), self.goal, case.rows(reached)
        )
        return seen.answer.replaced(reached, again)

    def run(self, attack: Attack, *, stop_at_success: bool) -> None:
        """Attack the images that are left, and keep what is better than what was known."""
        left = ~self.failed
        left &= ~self.fooled if stop_at_success else torch.tensor([by != CLEAN for by in self.by])
        jobs = (
            Job(
                self.names[i],
                i,
                self.images[i],
                int(self.label[i]),
                self.targets[i],
                self.references[i],
                self.beyond[i],
                self.reached[i],
            )
            for i in left.nonzero().flatten().tolist()
        )
        engine = self._engine(attack, stop_at_success)
        for result in engine.run(jobs):
            self._keep(result, attack)
        if isinstance(engine, ExternalEngine):
            self.remark(*(finding.message for finding in engine.findings))

    def confirm(self) -> None:
        """Judge all points anew; a random model has been judged by fresh draws, and new ones would be other facts."""
        if not self.found.random:
            claimed = self.fooled.clone()
            for index, rows in self._batches():
                self._note(index, self.oracle.judge(self.points[rows], self.goal, self._case(rows)).head(len(index)))
            for place in (claimed & ~self.fooled).nonzero().flatten().tolist():
                self.by[place] = None
                self.remark(f"a success on image {place} did not stand up to a second look and does not count")
        if self.failed.any():
            self.remark(f"the model gave NaN or infinite outputs in the ball of {int(self.failed.sum())} images")

    def result(self, device: torch.device) -> Perturbed:
        """Return the findings."""
        return Perturbed(
            self.points.to(device),
            self.fooled,
            tuple(self.by),
            self.margins,
            self.predictions,
            self.passes,
            self.failed,
            self.threat,
            tuple(self.remarks),
        )

    def _engine(self, attack: Attack, stop_at_success: bool) -> LaneEngine | ExternalEngine:
        rungs, seed, goal = self.found.rungs, self.seed, self.goal
        if isinstance(attack, ExternalAttack):
            return ExternalEngine(self.oracle, attack, self.threat, lanes=rungs[0], rungs=rungs, seed=seed, goal=goal)
        fit = attack.for_random_model() if self.found.random else attack
        sizes = self._sizes.setdefault(fit.uses_gradient, SteadySizes(rungs))
        return LaneEngine(
            self.oracle, fit, self.threat, lanes=rungs[0], rungs=sizes, seed=seed, goal=goal, leave=stop_at_success
        )

    def _keep(self, result: Result, attack: Attack) -> None:
        place, fooled, name = result.job.index, result.outcome == FOOLED, attack.name
        self.passes[place] += result.passes
        self.beyond[place] = {**self.beyond[place], **result.beyond}
        if result.outcome == FAILED:
            self.failed[place] = not self.fooled[place]  # a success before it stands
            return
        if by_gradients(attack, self.goal) and not self.found.random:
            self.reached[place] = min(self.reached[place], result.margin)
        known = bool(self.fooled[place])
        better = result.margin < float(self.margins[place])
        if (fooled and not known) or (fooled == known and better):
            self.points[place] = result.adversarial.to(self.points)
            self.margins[place], self.predictions[place] = result.margin, result.prediction
            self.fooled[place] = fooled
            self.by[place] = name if fooled else None

    def _note(self, index: Tensor, answer: Answer) -> None:
        self.fooled[index] = (answer.reached & answer.finite).cpu()
        self.failed[index] |= ~answer.finite.cpu()
        self.margins[index] = answer.margin.double().cpu()
        self.predictions[index] = answer.prediction.cpu()
        self.passes[index] += self.oracle.draws

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the places of a batch of images, and the rows that fill it to an allowed size with repetitions."""
        for index in torch.arange(len(self.images)).split(self.found.rungs[0]):
            size = smallest(self.found.rungs, len(index))
            yield index, index[torch.arange(size) % len(index)]

    def _case(self, rows: Tensor) -> Case:
        places = rows.tolist()
        known = [reference for reference in (self.references[place] for place in places) if reference is not None]
        target = [self.targets[place][0] if self.targets[place] else int(self.label[place]) for place in places]
        case = Case(self.label[rows], torch.tensor(target), torch.stack(known) if known else None)
        return case.to(self.oracle.device, self.oracle.dtype)


def _aim(model: Any, goal: str | Goal) -> tuple[AskedModel, Goal]:
    """Return the model whose output the goal is about, and the goal."""
    wanted = goal if isinstance(goal, Goal) else read_goals(goal, Known.of_model(model))[0]
    if wanted.of_features:
        encoder = getattr(model, "vlm", None)
        return AskedModel(model if encoder is None else encoder, unit=True), wanted
    if hasattr(model, "encode_text") and not hasattr(model, "class_names"):
        raise UserError(
            f"'{getattr(model, 'spec', type(model).__name__)}' gives features and knows no classes: pass "
            "load_classifier(spec, classes), or goal='feature'"
        )
    return AskedModel(model), wanted


def _labels(labels: Tensor | Sequence[int] | None, count: int, classes: int | None, goal: Goal) -> Tensor:
    if isinstance(goal, Targeted) and classes is not None and goal.target >= classes:
        raise UserError(f"goal 'targeted:{goal.target}': the model has {classes} classes, from 0 to {classes - 1}")
    if labels is not None:
        return as_labels(labels, count, None if goal.unknown else classes)
    if goal.labelled:
        raise UserError(f"goal '{goal.spec}' needs labels [N], the true classes of the images")
    return torch.full((count,), -1)


def _names(ids: Sequence[str] | None, images: Tensor) -> list[str]:
    if ids is None:
        return image_ids(images)
    names = [str(name) for name in ids]
    if isinstance(ids, str) or len(names) != len(images):
        raise UserError(f"ids must be a list of {len(images)} names, one for each image, got {len(names)}")
    return names


def _radius(eps: float | str) -> float:
    if isinstance(eps, str):
        pairs = parse_eps(eps)
        if len(pairs) > 1:
            raise UserError(f"{setting('eps')} must be one radius, got {len(pairs)} in '{eps}': call once for each")
        return pairs[0][1]
    try:
        return float(eps)
    except (TypeError, ValueError):
        raise UserError(f"{setting('eps')} must be a number or a text such as '2/255', got {eps!r}") from None


def _whole(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST[name]:
            raise UserError(f"{name} must be a whole number from 1 to {_MOST[name]:,}, got {count!r}")


def _remarks(asked: AskedModel, oracle: Oracle, found: Probe, lanes: int) -> Iterator[str]:
    if (fewer := found.fewer_than(lanes)) is not None:
        yield fewer
    if found.random:
        yield (
            f"the model is random: gradients are averaged over {oracle.eot} draws, and {oracle.draws} fresh draws "
            "judge by majority"
        )
    if asked.in_half:
        yield "the model computes in half precision, and is judged as it does"


def _fallbacks(attacks: Sequence[Attack], classes: int | None) -> Iterator[str]:
    for item in attacks:
        said = item.objective.fallback(classes) if isinstance(item, LaneAttack) and classes is not None else None
        if said is not None:
            yield f"attack '{item.name}': {said}"

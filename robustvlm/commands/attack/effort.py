"""Extra attacks on a few images that tell robustness from a blind attack.

An attack that works finds more with a larger ball and with more steps, more than noise does, and everything in a huge
ball. Where it does not, gradients are masked and the robust accuracy is an artefact (Athalye et al. 2018, arXiv
1802.00420; Carlini et al. 2019, arXiv 1902.06705, section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustvlm import attacks
from robustvlm.attacks.threat import l2_norms, per_image, project
from robustvlm.commands.common.questions import sign_test
from robustvlm.core.seeds import derive_seed, generator
from robustvlm.runs.records import Check

# What extra attacks on a small sample showed: more effort must find more, and a huge radius must find everything

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


# Extra attacks on a few images that tell robustness from a blind attack

MOST_IMAGES = 32
FEWEST_ROBUST = 3
N_ITER = 10
_NOISE_DRAWS, _N_SHADES, _N_RANDOM, _N_OTHERS = 11, 3, 3, 3
# Points that are judged without an attack: noise, plain and other images, the rounded image.
JUDGED_POINTS = _NOISE_DRAWS + _N_SHADES + _N_RANDOM + _N_OTHERS + 1
# Three attacks, one with twice the steps, and the judged points.
PASSES_PER_IMAGE = 3 * 2 * (N_ITER + 1) + 2 * (2 * N_ITER + 1) + JUDGED_POINTS
_HUGE_LINF = 128 / 255

NAMES = (
    "larger radius",
    "more steps",
    "search at random",
    "huge radius",
    "rounding to 8 bits",
    "unconfirmed successes",
)
# Goals that must be reached where plain grey lies in the ball; a model that may refuse may refuse all of that.
_REACHABLE = (attacks.Misclassify, attacks.Superclass, attacks.SuperclassAll)


def choose_sample(robust: Collection[str], fooled: Collection[str], seed: int) -> list[str]:
    """Return at most 32 image ids, half of them robust where there are enough; a pure function of the ids and the seed.

    Example:
        >>> choose_sample(["a", "b"], ["c"], seed=0)
        ['a', 'b', 'c']
    """

    def order(ids: Collection[str]) -> list[str]:
        return sorted(ids, key=lambda name: derive_seed(seed, "diagnosis", name))

    held, fell = order(robust), order(fooled)
    half = MOST_IMAGES // 2
    chosen = held[: max(half, MOST_IMAGES - len(fell))]
    return sorted(chosen + fell[: MOST_IMAGES - len(chosen)])


def short_attack(planned: Sequence[object]) -> attacks.LaneAttack:
    """Return the run's first gradient attack with 10 steps and one run; PGD if there is none or it makes one step."""
    for attack in planned:
        plain = attack.exhaustive() if isinstance(attack, attacks.LaneAttack) else None
        if plain is not None and plain.uses_gradient and not plain.leaves_ball and plain.n_iter > 1:
            targets: dict[str, Any] = {"n_targets": 1} if getattr(plain, "n_targets", None) else {}
            return dataclasses.replace(plain, name="diagnosis", n_iter=N_ITER, n_restarts=1, **targets)
    return attacks.PGD(name="diagnosis", n_iter=N_ITER)


@dataclass
class Diagnosis:
    """The extra attacks on one sample; every question is asked when its check is wanted, and never twice.

    Args:
        oracle: the model, as the run asks it; goal, threat: the run's, at one radius.
        attack: what to attack with, see `short_attack`.
        jobs: at most 32 images for which the goal is not reached unperturbed.
        rungs: batch sizes that the model takes, descending.
        seed: run seed; the draws are others than the run's own.
    """

    oracle: attacks.Oracle
    goal: attacks.Goal
    attack: attacks.LaneAttack
    threat: attacks.ThreatModel
    jobs: Sequence[attacks.Job]
    rungs: Sequence[int]
    seed: int
    on_pass: Callable[[int, int], None] | None = None

    def checks(self, known: Collection[str] = ()) -> Iterator[Check]:
        """Yield the findings, one at a time; those of `known` names are left out."""
        questions = (
            self._larger_radius, self._more_steps, self._noise, self._huge_radius, self._rounding, self._second_look
        )  # fmt: skip
        for name, question in zip(NAMES, questions, strict=True):
            found = question() if name not in known else None
            if found is not None:
                yield found

    def _larger_radius(self) -> Check | None:
        twice = 2 * self.threat.eps
        if self.threat.norm == "Linf" and twice > 1:
            return None
        wider = self._attack(self.attack, dataclasses.replace(self.threat, eps=twice))
        words = (f"eps {self.threat.eps:.4g}", f"eps {twice:.4g}")
        return more_effort("larger radius", self._fooled, _successes(wider), words=words)

    def _more_steps(self) -> Check:
        longer = self._attack(dataclasses.replace(self.attack, n_iter=2 * self.attack.n_iter), self.threat)
        words = (f"{self.attack.n_iter} steps", f"{2 * self.attack.n_iter} steps")
        return more_effort("more steps", self._fooled, _successes(longer), words=words)

    def _noise(self) -> Check:
        twice = 2 * self.threat.eps
        found = [False] * len(self.jobs)
        for draw in range(_NOISE_DRAWS):
            found = _either(
                found, self._reached(torch.cat([self._random_point(job, twice, draw) for job in self.jobs]))
            )
        return noise_wins(self._fooled, found, draws=_NOISE_DRAWS)

    def _huge_radius(self) -> Check | None:
        if type(self.goal) not in _REACHABLE:
            return None
        pixels = self.jobs[0].pixels
        radius = _HUGE_LINF if self.threat.norm == "Linf" else 0.5 * pixels.numel() ** 0.5
        ball = dataclasses.replace(self.threat, eps=max(radius, self.threat.eps))
        gradient = _successes(self._attack(self.attack, ball))
        plain = [False] * len(self.jobs)
        for candidate in self._plain_images():
            clean = self._clean
            plain = _either(plain, self._reached(project(candidate.to(clean).expand_as(clean), clean, ball)))
        text = "eps 128/255" if self.threat.norm == "Linf" else f"an L2 radius of {radius:.3g}"
        return huge_radius(gradient, plain, radius=text)

    def _plain_images(self) -> Iterator[Tensor]:
        """Yield grey, black and white, random images, and images of the sample, each for all of the sample."""
        shape = self.jobs[0].pixels.shape
        for shade in (0.5, 0.0, 1.0):
            yield torch.full(shape, shade)
        draws = generator(self.seed, "diagnosis", "plain")
        for _ in range(_N_RANDOM):
            yield torch.rand(shape, generator=draws)
        for shift in range(1, _N_OTHERS + 1):
            yield self._clean.roll(shift, 0)

    def _rounding(self) -> Check | None:
        fooled = [result for result in self._reference if result.outcome == attacks.FOOLED]
        if not fooled:
            return None
        points = torch.stack([result.adversarial for result in self._reference])
        held = self._reached((points * 255).round() / 255)
        survived = sum(h and result.outcome == attacks.FOOLED for h, result in zip(held, self._reference, strict=True))
        return rounding(len(fooled), survived)

    def _second_look(self) -> Check | None:
        if self.oracle.confirmed:
            return None
        why = "gradients in bf16" if self.oracle.precision == "bf16" else "the draws under the gradients"
        _ = self._reference
        return second_look(*self._claims, why=why)

    @cached_property
    def _reference(self) -> list[attacks.Result]:
        """The fresh attack that the others are compared with."""
        return self._attack(self.attack, self.threat)

    @cached_property
    def _fooled(self) -> list[bool]:
        return _successes(self._reference)

    @cached_property
    def _clean(self) -> Tensor:
        return torch.stack([job.pixels for job in self.jobs])

    def _attack(self, attack: attacks.LaneAttack, threat: attacks.ThreatModel) -> list[attacks.Result]:
        engine = attacks.LaneEngine(
            self.oracle,
            attack,
            threat,
            lanes=self.rungs[0],
            seed=derive_seed(self.seed, "diagnosis"),
            goal=self.goal,
            rungs=self.rungs,
            on_pass=self.on_pass,
        )
        place = {job.index: number for number, job in enumerate(self.jobs)}
        found = sorted(engine.run(self.jobs), key=lambda result: place[result.job.index])
        self._claims = (engine.claimed, engine.upheld)
        return found

    def _reached(self, points: Tensor) -> list[bool]:
        """Judge one point [3, H, W] per job, in batches of an allowed size."""
        found: list[bool] = []
        for start in range(0, len(self.jobs), self.rungs[0]):
            jobs = self.jobs[start : start + self.rungs[0]]
            rows = torch.arange(min(rung for rung in self.rungs if rung >= len(jobs))) % len(jobs)
            answer = self.oracle.judge(points[start : start + len(jobs)][rows], self.goal, self._case(jobs, rows))
            found += (answer.reached & answer.finite)[: len(jobs)].tolist()
        return found

    def _case(self, jobs: Sequence[attacks.Job], rows: Tensor) -> attacks.Case:
        references = [job.reference for job in jobs if job.reference is not None]
        label = torch.tensor([job.label for job in jobs])
        target = torch.tensor([job.targets[0] if job.targets else job.label for job in jobs])
        case = attacks.Case(label, target, torch.stack(references).cpu() if references else None).rows(rows)
        return case.to(self.oracle.device, self.oracle.dtype)

    def _random_point(self, job: attacks.Job, size: float, draw: int) -> Tensor:
        """Return the image with noise of the given size [1, 3, H, W]: every pixel changed by it, or that length."""
        draws = generator(self.seed, job.image_id, "diagnosis", draw)
        noise = torch.randn(1, *job.pixels.shape, generator=draws)
        noise = noise.sign() if self.threat.norm == "Linf" else noise / per_image(l2_norms(noise), noise)
        return (job.pixels[None] + size * noise).clamp(0, 1)


def _successes(results: Sequence[attacks.Result]) -> list[bool]:
    return [result.outcome == attacks.FOOLED for result in results]


def _either(first: Sequence[bool], second: Sequence[bool]) -> list[bool]:
    return [a or b for a, b in zip(first, second, strict=True)]

"""May a run's numbers be believed: questions to the model before the attacks, extra ones after, and what rows show."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustvlm.attacks import (
    FAILED,
    FOOLED,
    ROBUST,
    Goal,
    Job,
    LaneAttack,
    Probe,
    ThreatModel,
    catalog,
    external,
    goals,
    honesty,
    tensors,
)
from robustvlm.commands.attack import AttackPlan
from robustvlm.commands.attack.cost import BudgetSpent, MeteredOracle, Work
from robustvlm.commands.attack.effort import FEWEST_ROBUST, JUDGED_POINTS, NAMES, Diagnosis, choose_sample, short_attack
from robustvlm.commands.attack.goal import Aim
from robustvlm.commands.attack.store import AttackFact, CleanFact, Ledger
from robustvlm.commands.attack.verdicts import NO_ANSWER
from robustvlm.commands.common.inputs import Images, Picture
from robustvlm.commands.common.questions import SANITY_NAMES, fit_for, of_sanity
from robustvlm.data.source import UNKNOWN
from robustvlm.models.zoo import ADVERSARIALLY_TRAINED, BUNDLED, list_models
from robustvlm.runs.records import Check
from robustvlm.runs.settings import Observer
from robustvlm.stats import mcnemar_exact, rate

# What a run does besides its attacks to be believed: questions before them, and extra attacks after them

_EXTRA = "extra attacks"
STAND_INS = "gradient stand-ins"
"""The note that names parts of the model which are declared to have no gradient of their own."""


@dataclass(frozen=True)
class Checks:
    """The checks that one run makes of its model and of its attacks; what an earlier session found is not asked again.

    Args:
        plan: whose `checks` says which; oracle, aim, images: what is attacked, for what.
        ledger, observer: told what is found; attacks: the run's, in order.
        n_targets: how many classes worth aiming at are noted for each image.
    """

    plan: AttackPlan
    oracle: MeteredOracle
    aim: Aim
    images: Images
    ledger: Ledger
    observer: Observer
    attacks: Sequence[catalog.Attack]
    n_targets: int

    @property
    def _known(self) -> set[str]:
        return {check.name for check in self.ledger.checks}

    @property
    def _threats(self) -> list[ThreatModel]:
        return [ThreatModel(self.plan.norm, eps) for _, eps in self.plan.radii]

    def questions(self, images: Tensor, label: Tensor, found: Probe) -> list[Check]:
        """Return what a few passes over the first images [B, 3, H, W] with labels [B] say of the model's honesty."""
        if self.plan.checks == "none" or self._known & set(SANITY_NAMES):
            return []
        goal, most = self.aim.goals[0], min(honesty.MOST_IMAGES, found.rungs[0])
        images, label = images[:most], label[:most]
        if self.aim.unknown:
            label = torch.full_like(label, UNKNOWN)
        seen = tensors.ask_unperturbed(self.oracle, goal, images, label)
        sanity = honesty.inspect_model(
            self.oracle,
            images,
            goal,
            goals.Case(label, reference=seen.reference),
            self._threats[0],
            random=found.random,
            classes=None if isinstance(goal, goals.FeatureGoal) else len(self.images.source.class_names),
        )
        attacks = [attack for attack in self.attacks if isinstance(attack, LaneAttack)]
        declared = any(note.name == STAND_INS for note in self.aim.notes)
        return of_sanity(sanity, attacks=attacks, zero_gradients=found.zero_gradients, declared=declared)

    def extra_work(self, planned: Sequence[Work]) -> list[Work]:
        """Return what the extra attacks will cost at most, as work on images that are `planned` to be attacked."""
        if self.plan.checks != "full" or _EXTRA in self._known:
            return []
        names = dict.fromkeys(name for stage in planned for name in stage.images)
        goal = self.aim.goals[0].spec
        names = names or dict.fromkeys((goal, fact.image_id) for fact in self.ledger.clean.values() if fact.exposed)
        sample, attack = list(names)[: honesty.MOST_IMAGES], short_attack(self.attacks)
        # Points that are judged and not attacked count as attacks of as many passes.
        judged = math.ceil(JUDGED_POINTS * self.oracle.draws / (2 * (attack.n_iter + 1) * self.oracle.eot))
        longer = dataclasses.replace(attack, n_iter=2 * attack.n_iter)
        return [Work(longer, sample)] + [Work(attack, sample)] * (3 + judged)

    def extra(self, found: Probe) -> None:
        """Attack a sample of the run's images anew, at most `PASSES_PER_IMAGE` passes each, and record what it says."""
        oracle, goal, known = self.oracle, self.aim.goals[0], self._known
        if self.plan.checks != "full" or _EXTRA in known:
            return
        threat, held, fell = _doubtful(self.ledger, goal, self._threats)
        if threat is None:
            self._note(
                f"Not made: fewer than {FEWEST_ROBUST} images withstood the attacks, so there is nothing to doubt."
            )
            return
        jobs = _sample(self.ledger, self.images, choose_sample(held, fell, self.plan.seed))
        try:
            if tensors.needs_briefing(goal):
                jobs = [job for job, _ in tensors.brief(jobs, oracle, goal, found.rungs, self.n_targets)]
        except BudgetSpent:
            self._note("Not made: the budget was spent.")
            return
        if not jobs:  # the files are gone since
            return
        self.observer.begin("checks", len(NAMES), len(known & set(NAMES)))
        before = oracle.passes.forward + oracle.passes.backward
        attack = fit_for(short_attack(self.attacks), found)
        told = self.observer.passed
        diagnosis = Diagnosis(oracle, goal, attack, threat, jobs, found.rungs, self.plan.seed, on_pass=told)
        try:
            for check in diagnosis.checks(known):
                self.ledger.add_checks([check])
                self.observer.advance()
        except BudgetSpent:
            self._note("Not finished: the budget was spent.")
            return
        spent = oracle.passes.forward + oracle.passes.backward - before
        said = f"{len(jobs)} images were attacked anew at eps {threat.eps:.4g}, in {spent:,} passes of this session."
        self._note(said, "ok")

    def _note(self, message: str, level: Literal["note", "ok"] = "note") -> None:
        self.ledger.add_checks([Check(name=_EXTRA, level=level, message=message)])


def _doubtful(
    ledger: Ledger, goal: Goal, threats: Collection[ThreatModel]
) -> tuple[ThreatModel | None, list[str], list[str]]:
    """Return the largest ball in which images withstood all attacks, with their ids, and those of fallen images."""
    exposed = {fact.index: fact.image_id for fact in ledger.clean.values() if fact.exposed}
    for threat in sorted(threats, key=lambda ball: ball.eps, reverse=True):
        facts = [fact for fact in ledger.found.values() if fact.goal == goal.spec and fact.eps <= threat.eps]
        fell = {fact.index for fact in facts if fact.outcome == FOOLED}
        held = {fact.index for fact in facts if fact.eps == threat.eps and fact.outcome == ROBUST} - fell
        if len(held) >= FEWEST_ROBUST:
            return threat, [exposed[i] for i in held if i in exposed], [exposed[i] for i in fell if i in exposed]
    return None, [], []


def _sample(ledger: Ledger, images: Images, names: Sequence[str]) -> list[Job]:
    """Return the jobs of the images of these ids, in the order of the source."""
    facts = {fact.image_id: fact for fact in ledger.clean.values()}
    jobs: dict[str, Job] = {}
    for item in images.stream(lambda name: name in names):
        if isinstance(item, Picture) and item.id in names and item.id not in jobs:
            fact = facts[item.id]
            jobs[item.id] = Job(item.id, fact.index, item.pixels, fact.label, tuple(fact.targets))
    return list(jobs.values())


def published(spec: str) -> bool:
    """Whether a spec names weights that are known to be published without adversarial training.

    Example:
        >>> published("tiny"), published("ViT-B/32/openai"), published("tiny+smooth:0.25")
        (True, True, False)
    """
    if spec in BUNDLED:
        return spec not in ADVERSARIALLY_TRAINED
    name, slash, tag = spec.rpartition("/")
    plain = f"{name.replace('/', '-')}/{tag}"
    return bool(slash) and "+" not in spec and any(model.spec == plain for model in list_models())


# What the finished rows show

_BALL_SLACK = 1e-6
# Between neighbouring float32 numbers just below 1.
_SPACING = 2.0**-24
# AutoAttack warns when its black-box attack takes more than this share of accuracy from the white-box ones.
_BLACK_BOX_SHARE = 0.002
# Attacks of the published packages that ask for no gradient.
_BLACK_BOX = ("square", "spsa")
# Published models without adversarial training keep next to nothing at this Linf radius.
_UNDEFENDED_EPS, _UNDEFENDED_SHARE = 4 / 255, 0.1


def of_results(
    clean: Sequence[CleanFact],
    found: Sequence[AttackFact],
    *,
    threats: Sequence[ThreatModel],
    attacks: Sequence[LaneAttack | external.ExternalAttack],
    n_classes: int,
    undefended: str | None = None,
    pixels: int = 0,
) -> list[Check]:
    """Return what the finished rows show.

    Args:
        n_classes: outcomes that the objectives tell apart.
        undefended: the model's name, if it is known to be published without adversarial training.
        pixels: values in one image (3 H W), to compare radii of the two norms.
    """
    failed = sum(fact.outcome == FAILED for fact in found) + sum(fact.prediction == NO_ANSWER for fact in clean)
    checks = [_inside_ball(found, threats), *_tiny_radius(threats)]
    if failed:
        message = (
            f"{failed} answers could not be had (output not finite, or the image was lost): not counted as robust."
        )
        checks.append(Check(name="failed images", level="fault", message=message))
    for attack in attacks:
        fallback = attack.objective.fallback(n_classes) if isinstance(attack, LaneAttack) else None
        if fallback:
            checks.append(Check(name=f"objective, of {attack.name}", level="note", message=fallback + "."))
    if not any(fact.exposed for fact in clean):
        message = (
            "On no image was there anything to attack: the model was wrong, or the goal was reached, without any "
            "perturbation, so there is no success rate."
        )
        checks.append(Check(name="something to attack", level="fault", message=message))
    exposed = sum(fact.exposed for fact in clean)
    checks += black_box(found, attacks, exposed=exposed)
    return checks + (weak_attack(found, threats, undefended, exposed=exposed, pixels=pixels) if undefended else [])


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


def _tiny_radius(threats: Sequence[ThreatModel]) -> list[Check]:
    """Warn of balls in which hardly a float32 pixel can move: whatever is robust there says nothing of the model."""
    tiny = [threat for threat in threats if threat.eps < _SPACING]
    if not tiny:
        return []
    message = (
        f"At eps {tiny[0].eps:.4g} pixels hardly move at all: numbers of 32 bits near 1 lie {_SPACING:.2g} apart. "
        "What is robust there was not put to the test."
    )
    return [Check(name="size of the radius", level="warning", message=message)]


def black_box(
    found: Sequence[AttackFact], attacks: Sequence[LaneAttack | external.ExternalAttack], *, exposed: int
) -> list[Check]:
    """Count the images that an attack without gradients fooled after attacks with gradients had left them."""
    blind = {attack.name for attack in attacks if _sees(attack) is False}
    seeing = {attack.name for attack in attacks if _sees(attack)}
    if not blind or not seeing:
        return []
    left = {(fact.eps, fact.goal, fact.index) for fact in found if fact.attack in seeing and fact.outcome == ROBUST}
    only = {
        fact.index
        for fact in found
        if fact.attack in blind and fact.outcome == FOOLED and (fact.eps, fact.goal, fact.index) in left
    }
    return [black_box_check(len(only), exposed, ", ".join(sorted(blind)))]


def _sees(attack: LaneAttack | external.ExternalAttack) -> bool | None:
    """Whether an attack uses gradients; None for a plan of both kinds."""
    if isinstance(attack, LaneAttack):
        return attack.uses_gradient
    return None if attack.kind in external.VERSIONS else attack.kind.lower() not in _BLACK_BOX


def black_box_check(only: int, exposed: int, name: str) -> Check:
    """Judge that `name` alone fooled `only` of `exposed` images: more than a stray one means masked gradients."""
    if not only:
        message = f"No image fell to {name} that attacks with gradients had left."
        return Check(name="black box against white box", level="ok", message=message)
    images = "image" if only == 1 else "images"
    found = f"{name}, which needs no gradient, fooled {only} {images} that attacks with gradients had left"
    if only > 1 and rate(only, exposed, confidence=0.9).low > _BLACK_BOX_SHARE:
        message = (
            f"{found}: the gradients hide what is there, or those attacks had too few steps. Robustness is lower than "
            "they say: look for masked gradients, and give them more steps and restarts."
        )
        return Check(name="black box against white box", level="warning", message=message)
    return Check(name="black box against white box", level="note", message=f"{found}; so few occur by chance.")


def weak_attack(
    found: Sequence[AttackFact], threats: Sequence[ThreatModel], model: str, *, exposed: int, pixels: int
) -> list[Check]:
    """Warn when a model without any defence seems to withstand a radius that such models do not withstand."""
    large = [threat.eps for threat in threats if _is_large(threat, pixels)]
    outcomes: dict[float, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for fact in found:
        if fact.goal == "misclassify":
            outcomes[fact.eps][fact.index].add(fact.outcome)
    for eps in sorted(large):
        held = sum(kinds == {ROBUST} for kinds in outcomes[eps].values())
        if exposed and rate(held, exposed).low > _UNDEFENDED_SHARE:
            message = (
                f"{held} of {exposed} images withstood eps {eps:.4g}, but '{model}' was published without adversarial "
                f"training, and such models keep less than {_UNDEFENDED_SHARE:.0%} there: the attack is too weak or "
                "broken. See the other checks, and use --attack apgd-ce,apgd-t with 100 steps or more."
            )
            return [Check(name="attack strength", level="warning", message=message)]
    return []


def _is_large(threat: ThreatModel, pixels: int) -> bool:
    """Whether the ball contains the Linf ball of 4/255: an L2 ball does from 4/255 times the root of its dimension."""
    reach = _UNDEFENDED_EPS * (1 if threat.norm == "Linf" else pixels**0.5)
    return pixels > 0 and threat.eps >= reach * (1 - 1e-9)


# What a published program says of the images that our attacks left: every disagreement, with a paired test

_SHOWN = 10  # ids in a sentence


def of_second_opinion(
    clean: Sequence[CleanFact],
    found: Sequence[AttackFact],
    *,
    attack: str,
    random: bool = False,
    group: Callable[[str], str] = str,
) -> list[Check]:
    """Return a check per eps: did the attack that came last break an image that all others had left?

    The paired test compares our verdicts with those of both programs together, over the images that were right when
    clean: an image that we fooled is fooled for both, so only those that they alone broke count. On a `random` model
    what they broke besides is no fault of ours: a point near the boundary is judged by luck. Images of one `group`, by
    their ids, are copies of one thing and count once in the test.

    Example:
        >>> of_second_opinion([], [], attack="autoattack")
        []
    """
    exposed = {fact.index: fact.image_id for fact in clean if fact.exposed}
    radii = sorted({fact.eps for fact in found})
    return [_at(eps, exposed, found, attack, several=len(radii) > 1, random=random, group=group) for eps in radii]


def _at(
    eps: float,
    exposed: dict[int, str],
    found: Sequence[AttackFact],
    attack: str,
    *,
    several: bool,
    random: bool,
    group: Callable[[str], str],
) -> Check:
    rows = [fact for fact in found if fact.attack == attack and fact.eps == eps]
    again = [fact for fact in rows if fact.outcome in (FOOLED, ROBUST)]
    broken = sorted(fact.index for fact in again if fact.outcome == FOOLED)
    name = f"second opinion at eps {eps:.4g}" if several else "second opinion"
    gone = {fact.index for fact in found if fact.eps <= eps and fact.outcome == FOOLED}
    missing = len(exposed.keys() - gone - {fact.index for fact in rows})
    if missing:
        message = f"The run ended before '{attack}' had attacked all images again that withstood: {missing} are left."
        return Check(name=name, level="note", message=message)
    if not again:
        return Check(name=name, level="ok", message=f"No image was left for '{attack}' to attack again.")
    images = f"{len(again)} image{'s' if len(again) != 1 else ''}"
    if not broken:
        message = f"'{attack}' attacked the {images} again that withstood our own attacks, and broke none."
        return Check(name=name, level="ok", message=message)
    ours = {fact.index for fact in found if fact.attack != attack and fact.eps <= eps and fact.outcome == FOOLED}
    order = sorted(exposed)
    test = mcnemar_exact(
        [i in ours for i in order],
        [i in ours or i in broken for i in order],
        groups=[group(exposed[i]) for i in order],
    )
    ids = ", ".join(f"'{exposed[i]}'" for i in broken[:_SHOWN]) + (", ..." if len(broken) > _SHOWN else "")
    advice = (
        "The model is random, so that luck decides near its boundary: give our attacks more steps, or take more draws."
        if random
        else "Give our attacks more steps; images that still fall to it alone are a bug worth reporting, with the "
        "image and this run's settings."
    )
    message = (
        f"'{attack}' broke {len(broken)} of the {images} that withstood our own attacks ({ids}): they count as fooled. "
        f"{advice} "
        f"Paired test of our verdicts against those of both together, {test.total} images: p = {test.p_value:.2g}."
    )
    return Check(name=name, level="note" if random else "fault", message=message)

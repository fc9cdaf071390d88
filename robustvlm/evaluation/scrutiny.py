"""Which checks a run makes, on which images, and when: `--checks none`, `quick` or `full`.

quick: questions to the model before the attacks (some 18 passes an image), and what the rows say after them.
full: also extra attacks on at most 32 images at the end, which cost at most `PASSES_PER_IMAGE` passes each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustvlm.attacks import FOOLED, ROBUST, Goal, Job, LaneAttack, Probe, ThreatModel
from robustvlm.attacks.goals import Case
from robustvlm.attacks.goals.feature import FeatureGoal
from robustvlm.attacks.sanity import MOST_IMAGES, inspect_model
from robustvlm.attacks.unperturbed import ask_unperturbed, brief, needs_briefing
from robustvlm.data.source import UNKNOWN
from robustvlm.evaluation import checks
from robustvlm.evaluation.budget import BudgetSpent
from robustvlm.evaluation.diagnosis import FEWEST_ROBUST, JUDGED_POINTS, NAMES, Diagnosis, choose_sample, short_attack
from robustvlm.evaluation.estimate import Work
from robustvlm.evaluation.images import Images, Picture
from robustvlm.evaluation.ledger import Ledger
from robustvlm.models.zoo import ADVERSARIALLY_TRAINED, BUNDLED, list_models
from robustvlm.runs.summary import Check

if TYPE_CHECKING:
    from robustvlm.evaluation.attack_run import AttackRun

MODES = ("full", "quick", "none")

_EXTRA = "extra attacks"
# The note that names parts of the model which are declared to have no gradient of their own.
STAND_INS = "gradient stand-ins"


def questions(run: AttackRun, images: Tensor, label: Tensor, found: Probe) -> list[Check]:
    """Return what a few passes over the first images [B, 3, H, W] with labels [B] say of the model's honesty.

    Nothing when checks are off, or when an earlier session has asked.
    """
    if run.config.checks == "none" or _known(run.ledger) & set(checks.SANITY_NAMES):
        return []
    oracle, goal = run.oracle, run.aim.goals[0]
    images, label = images[: min(MOST_IMAGES, found.rungs[0])], label[: min(MOST_IMAGES, found.rungs[0])]
    if run.aim.unknown:
        label = torch.full_like(label, UNKNOWN)
    seen = ask_unperturbed(oracle, goal, images, label)
    sanity = inspect_model(
        oracle,
        images,
        goal,
        Case(label, reference=seen.reference),
        min((stage.threat for stage in run.stages), key=lambda ball: ball.eps),
        random=found.random,
        classes=None if isinstance(goal, FeatureGoal) else len(run.source.class_names),
    )
    attacks = [stage.attack for stage in run.stages if isinstance(stage.attack, LaneAttack)]
    declared = any(note.name == STAND_INS for note in run.aim.notes)
    return checks.of_sanity(sanity, attacks=attacks, zero_gradients=found.zero_gradients, declared=declared)


def extra_work(run: AttackRun, planned: Sequence[Work]) -> list[Work]:
    """Return what the extra attacks will cost at most, as work on images that are `planned` to be attacked anyway."""
    if run.config.checks != "full" or _EXTRA in _known(run.ledger):
        return []
    names = dict.fromkeys(name for stage in planned for name in stage.images)
    goal = run.aim.goals[0].spec
    names = names or dict.fromkeys((goal, fact.image_id) for fact in run.ledger.clean.values() if fact.exposed)
    sample, attack = list(names)[:MOST_IMAGES], short_attack([stage.attack for stage in run.stages])
    # Points that are judged and not attacked count as attacks of as many passes.
    judged = math.ceil(JUDGED_POINTS * run.oracle.draws / (2 * (attack.n_iter + 1) * run.oracle.eot))
    longer = dataclasses.replace(attack, n_iter=2 * attack.n_iter)
    return [Work(longer, sample)] + [Work(attack, sample)] * (3 + judged)


def extra_attacks(run: AttackRun, found: Probe) -> None:
    """Attack a sample of the run's images anew, and record what that says; what is recorded is not done again."""
    ledger, oracle, goal = run.ledger, run.oracle, run.aim.goals[0]
    known = _known(ledger)
    if run.config.checks != "full" or _EXTRA in known:
        return
    threat, held, fell = _doubtful(ledger, goal, {stage.threat for stage in run.stages})
    if threat is None:
        message = f"Not made: fewer than {FEWEST_ROBUST} images withstood the attacks, so there is nothing to doubt."
        ledger.add_checks([Check(name=_EXTRA, level="note", message=message)])
        return
    jobs = _sample(ledger, run.images, choose_sample(held, fell, run.config.seed))
    if needs_briefing(goal):
        jobs = [job for job, _ in brief(jobs, oracle, goal, found.rungs, run.n_targets)]
    if not jobs:  # the files are gone since
        return
    run.observer.begin_stage("checks", len(NAMES), len(known & set(NAMES)))
    before = oracle.passes.forward + oracle.passes.backward
    attack = checks.fit_for(short_attack([stage.attack for stage in run.stages]), found)
    diagnosis = Diagnosis(oracle, goal, attack, threat, jobs, found.rungs, run.config.seed, on_pass=run.observer.passed)
    try:
        for check in diagnosis.checks(known):
            ledger.add_checks([check])
            run.observer.image_done(None)
    except BudgetSpent:
        message = "Not finished: the budget was spent."
        ledger.add_checks([Check(name=_EXTRA, level="note", message=message)])
        return
    spent = oracle.passes.forward + oracle.passes.backward - before
    message = f"{len(jobs)} images were attacked anew at eps {threat.eps:.4g}, in {spent:,} passes of this session."
    ledger.add_checks([Check(name=_EXTRA, level="ok", message=message)])


def _halvings(size: int) -> tuple[int, ...]:
    """Return batch sizes from `size` down to 1: nothing here has to agree to the bit with other batches."""
    return (size, *_halvings(size // 2)) if size > 1 else (1,)


def _known(ledger: Ledger) -> set[str]:
    return {check.name for check in ledger.checks}


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

"""The work of `robustvlm attack`: from its settings to a run ready to start, and from its facts to its files."""

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustvlm import attacks
from robustvlm.attacks import catalog, goals, honesty, oracle
from robustvlm.attacks.goals.classes import levels_of
from robustvlm.commands.attack import AttackPlan, AttackSettings, checks, cost, record
from robustvlm.commands.attack.goal import Aim, check_goal, make_aim, picture_facts
from robustvlm.commands.attack.report import report_of as report_of
from robustvlm.commands.attack.report import show as show
from robustvlm.commands.attack.report import write_report as write_report
from robustvlm.commands.attack.run import AttackRun
from robustvlm.commands.attack.store import Ledger, make_rows, trim_gallery
from robustvlm.commands.attack.summary import parse_condition as parse_condition
from robustvlm.commands.attack.summary import summarise
from robustvlm.commands.common.inputs import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.common.questions import copies
from robustvlm.commands.common.store import new_session
from robustvlm.core.files import write_text
from robustvlm.core.ranks import current_ranks, device_of_rank, resolve_device
from robustvlm.core.size import Size, area, sides, size_text
from robustvlm.data import DataSource, open_data
from robustvlm.data.source import select
from robustvlm.defenses import Classifier, load_classifier
from robustvlm.defenses.own import load_own
from robustvlm.errors import BadSetting, UserError, nearest, setting
from robustvlm.runs.manifest import Manifest
from robustvlm.runs.records import Check, Estimate, write_rows
from robustvlm.runs.run import Facts, Session

RESULTS = ("summary.json", "results.parquet")
NOTHING_LEFT = Estimate(images=0, passes_least=0, passes_most=0, seconds_least=0.0, seconds_most=0.0)
# Targets that attacks have unless told otherwise; with fewer classes they take one for each.
_PLANNED_TARGETS = 9

read_run = record.load_run


@dataclass(frozen=True)
class AttackWork:
    """Model, data and attacks of a run, all checked; each process attacks its share of the images.

    A budget is no part of what defines the run: with a larger one, or none, the same run goes on.
    """

    facts: Facts
    plan: AttackPlan
    attacks: list[attacks.Attack]
    source: DataSource
    classifier: Classifier
    aim: Aim
    budget: cost.Budget

    def run(self, session: Session) -> None:
        """Attack what is left to attack, and write rows and summary."""
        with self._working(session, self.budget) as run:
            run.run()
            if session.ranks.leader:
                self._finish(run.ledger, session)

    def estimate(self, session: Session) -> Estimate:
        """Return what the attacks will cost, or what is left of them; the clean pass is made for it, and kept."""
        if session.folder.holds(*RESULTS):
            return NOTHING_LEFT
        with self._working(session, cost.Budget()) as run:
            return run.estimate() or NOTHING_LEFT

    @contextmanager
    def _working(self, session: Session, budget: cost.Budget) -> Iterator[AttackRun]:
        ranks = session.ranks
        ledger = Ledger(session.folder, rank=ranks.rank, session=ranks.share(new_session()))
        try:
            yield AttackRun(
                plan=self.plan,
                source=self.source,
                aim=self.aim,
                attacks=self.attacks,
                ledger=ledger,
                observer=session.observer,
                framing=self.classifier.framing,
                ranks=ranks,
                budget=budget,
            )
        finally:
            ledger.close()

    def _finish(self, ledger: Ledger, session: Session) -> None:
        """Write `results.parquet` and `summary.json` from what the ledger holds."""
        plan, manifest = self.plan, session.manifest
        clean = [ledger.clean[index] for index in sorted(ledger.clean)]
        found = list(ledger.found.values())
        judged = checks.of_results(
            clean,
            found,
            threats=[attacks.ThreatModel(plan.norm, eps) for _, eps in plan.radii],
            attacks=self.attacks,
            n_classes=min(goal.outcomes(len(self.source.class_names)) for goal in self.aim.goals),
            undefended=plan.model if checks.published(plan.model) else None,
            pixels=3 * area(plan.resolution),
        )
        judged += copies(self.source.group(fact.image_id) for fact in clean)
        if plan.second_opinion is not None:
            random = ledger.drawn is not None
            judged += checks.of_second_opinion(
                clean, found, attack=self.attacks[-1].name, random=random, group=self.source.group
            )
        if ledger.stopped is None:  # what an unfinished run shows need not hold when it goes on
            ledger.add_checks(judged)
        rows = make_rows(
            clean,
            found,
            norm=plan.norm,
            eps=[eps for _, eps in plan.radii],
            attacks=[attack.name for attack in self.attacks],
            goals=[goal.spec for goal in self.aim.goals],
        )
        waiting = _waiting(ledger, manifest)
        summary = summarise(
            rows,
            manifest,
            cost=ledger.cost,
            checks=list({check.name: check for check in [*ledger.checks, *judged]}.values()),
            unreadable=ledger.unreadable,
            left_out=len(ledger.left_out),
            waiting=waiting or 0,
            uncounted=waiting is None,
            unfinished=_unfinished(ledger, waiting or 0, uncounted=waiting is None),
            estimate=ledger.estimate,
            drawn=ledger.drawn,
            group=self.source.group,
            awaited=_awaited(self.source, ledger.seen, manifest["config"]["limit"], waiting or 0),
        )
        trim_gallery(ledger.folder.gallery_path)
        with session.results():
            write_rows(ledger.folder.results_path, rows)
            write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")


def _unfinished(ledger: Ledger, waiting: int, *, uncounted: bool) -> str | None:
    """Say in one sentence why the session stopped early, and what it did not come to."""
    seen = len(ledger.seen)
    if uncounted:
        return f"{ledger.stopped}, with {seen:,} of an unknown number of images classified"
    if ledger.stopped is None or not waiting:
        return ledger.stopped
    return f"{ledger.stopped}, with {seen:,} of {seen + waiting:,} images classified"


def _awaited(source: DataSource, seen: Collection[str], limit: int | None, waiting: int) -> list[str] | None:
    """Return what the images that a run has not seen yet are copies of; as none where only streaming can tell.

    None where each is its own, as in any source that knows of no copies.
    """
    if type(source).group is DataSource.group:
        return None
    ids = source.ids()
    if ids is None or not waiting:
        return []
    return [source.group(name) for name in select(ids, limit) if name not in seen][:waiting]


def _waiting(ledger: Ledger, manifest: Manifest) -> int | None:
    """Return how many images a run that stopped early has still to classify; None where nobody knows."""
    images, limit = manifest["data"]["images"], manifest["config"]["limit"]
    # What the attacks will cost is said once all images of the clean pass are there.
    if ledger.stopped is None or (images is None and ledger.estimate is not None):
        return 0
    total = min((count for count in (images, limit) if count is not None), default=None)
    return None if total is None else max(0, total - len(ledger.seen))


# From the words of a command to everything an attack run needs; every mistake is found before any work begins


def open_work(settings: AttackSettings) -> AttackWork:
    """Check all settings, open the data and load the model.

    Cheap checks come first, so that a mistyped option is not found only after a model was loaded.
    """
    budget = cost.parse_budget(settings.budget)
    planned = _attacks(settings.attack, settings.second_opinion, steps=settings.steps, restarts=settings.restarts)
    norm = attacks.parse_norm(settings.norm)
    for item in planned:
        if isinstance(item, attacks.ExternalAttack):
            attacks.require_norm(item, norm)
    radii = _radii(settings.eps, norm)
    device = str(device_of_rank(resolve_device(settings.device), current_ranks()))
    _check_precision(settings.precision)
    check_goal(settings.goal, settings.min_cos)
    if settings.goal.split(":")[0].strip() in set(goals.GOALS) - {"feature"}:  # a goal of one's own may read it
        settings.require_usual(("min_cos",), f"is for {setting('goal', 'feature')}: leave it out")
    source = _source(settings)
    classifier = _classifier(settings.model, source, device)
    size = _resolution(settings.resolution, classifier)
    model = facts_of(classifier, "can_reject") | ({"abstains": True} if classifier.abstains else {})
    model |= code_facts(_own(settings.goal, planned)) | picture_facts(settings.goal)
    data = describe_data(source) | {"superclasses": _superclasses(source), "levels": _levels(source)}
    probe = probe_of(classifier, source.class_names, source.templates, resolution=size)
    opened = honesty.open_gradients(classifier)
    aim = make_aim(
        settings.goal,
        source=source,
        classifier=classifier,
        resolution=size,
        min_cos=settings.min_cos,
        seed=settings.seed,
    )
    remarks = remarks_of(source, classifier)
    aim = dataclasses.replace(aim, notes=(*_notes(opened, classifier), *_data_notes(remarks)))
    _require_ball(norm, radii, size)
    _require_fit(planned, aim, attacks.ThreatModel(norm, radii[0][1]), n_classes=len(source.class_names))
    chosen = {
        "model": settings.model if isinstance(settings.model, str) else classifier.spec,
        "data": settings.data if isinstance(settings.data, str) else source.spec,
        "norm": norm,
        "device": device,
        "lanes": _lanes(settings.lanes, device),
        "resolution": size,
        "radii": radii,
        "eot_if_random": max(oracle.EOT_IF_RANDOM, attacks.recommended_eot(settings.attack)),
    }
    plan = AttackPlan(**dict(settings) | chosen)
    config = plan.stored(
        goal=aim.spec,
        goals=[item.spec for item in aim.goals],
        attack=[item.name for item in planned],
        second_opinion=None if settings.second_opinion is None else planned[-1].name,
    )
    facts = Facts((plan.model, plan.data), config, model, data, probe=probe, remarks=remarks)
    return AttackWork(facts, plan, planned, source, classifier, aim, budget)


def _source(settings: AttackSettings) -> DataSource:
    if isinstance(settings.data, DataSource):
        settings.require_none(("classes", "templates", "tree"), "is for data that is named: open yours with it")
        return settings.data
    if not isinstance(settings.data, str):
        kind = type(settings.data).__name__
        raise BadSetting("data", "must be a spec, or a source of `open_data`", got=f"a {kind}")
    return open_data(settings.data, classes=settings.classes, templates=settings.templates, tree=settings.tree)


def _classifier(model: object, source: DataSource, device: str) -> Classifier:
    """Return the classifier of a spec, or a copy of an object that is one: what a caller has stays as it is."""
    if isinstance(model, str):
        return load_classifier(model, source.class_names, source.templates, device=device)
    if isinstance(model, Classifier):
        if tuple(model.class_names) != tuple(source.class_names):
            raise BadSetting(
                "model", "must know the classes of the data: load it with them, as load_classifier(SPEC, DATA)"
            )
        return copy.deepcopy(model).to(device)
    if not isinstance(model, nn.Module):
        raise BadSetting(
            "model",
            "must be a spec, a classifier of `load_classifier` or a torch module",
            got=f"a {type(model).__name__}",
        )
    spec = f"{type(model).__module__}:{type(model).__qualname__}"
    return load_own(model, spec, source.class_names, torch.device(device))


def _radii(eps: str | float | None, norm: str) -> list[tuple[str, float]]:
    """Return the radii as texts and values, ascending; the usual one for the norm where none is given."""
    text = attacks.DEFAULT_EPS[norm] if eps is None else eps if isinstance(eps, str) else repr(float(eps))
    radii = attacks.parse_eps(text)
    for _, value in radii:
        attacks.ThreatModel(norm, value)
    return radii


def _attacks(text: str, second_opinion: str | None, *, steps: int | None, restarts: int | None) -> list[attacks.Attack]:
    """Return the attacks in order, the second opinion last: it so gets the images that all others have left."""
    chosen = attacks.parse_attacks(text, steps=steps, restarts=restarts)
    if second_opinion is None:
        return chosen
    last = attacks.parse_second_opinion(second_opinion)
    if last.name in [item.name for item in chosen]:
        raise UserError(f"the second opinion '{last.name}' is among the attacks already: name it in one place")
    return [*chosen, last]


def _own(goal: str, chosen: list[attacks.Attack]) -> list[str]:
    """Return the names among these that stand for code of the user's."""
    own = [item.name for item in chosen if isinstance(item, attacks.LaneAttack) and catalog.is_foreign(item)]
    return own + ([goal] if goal.partition(":")[0] not in goals.GOALS else [])


def _require_fit(chosen: list[attacks.Attack], aim: Aim, threat: attacks.ThreatModel, *, n_classes: int) -> None:
    for item in chosen:
        if isinstance(item, attacks.ExternalAttack):
            for goal in aim.goals:
                attacks.require_fit(item, threat, n_classes=n_classes, goal=goal)
        elif (getattr(item, "n_targets", None) or 0) > max(n_classes - 1, _PLANNED_TARGETS):
            raise UserError(
                f"attack '{item.name}' asks for more targets than there are wrong classes: "
                f"pass targets={max(n_classes - 1, 1)} or fewer"
            )


def _resolution(asked: int | None, classifier: Classifier) -> Size:
    """Return the size of the images that are perturbed, which a model that is not square leaves no choice of."""
    own = classifier.image_size
    if asked is not None and not isinstance(own, int):
        raise BadSetting(
            "resolution",
            f"is the side of a square, and '{classifier.spec}' takes images of {size_text(own)} pixels (height x "
            "width), which are perturbed at that size: leave it out",
            got=asked,
        )
    return asked or own


def _require_ball(norm: str, radii: list[tuple[str, float]], size: Size) -> None:
    """Refuse L2 balls that hold every image there is: the number was meant for another scale of pixels."""
    text, largest = radii[-1]
    (height, width), whole = sides(size), math.sqrt(3 * area(size))
    if norm == "L2" and largest > whole:
        raise UserError(
            f"eps {text} is larger than the distance of any two images of {height} x {width} pixels in [0, 1], which "
            f"is {whole:.4g}: for grey levels pass {text}/255"
        )


def _lanes(lanes: int | None, device: str) -> int:
    return lanes if lanes is not None else 256 if device.startswith("cuda") else 64


def _check_precision(precision: str) -> None:
    if precision not in attacks.PRECISIONS:
        raise UserError(f"unknown precision '{precision}': {nearest(precision, attacks.PRECISIONS)}")


def _notes(opened: list[str], classifier: Classifier) -> tuple[Check, ...]:
    found = []
    if opened:
        said = "; ".join(opened)
        found.append(Check(name=checks.STAND_INS, level="note", message=f"{said[0].upper()}{said[1:]}."))
    if any(getattr(part, "in_half", False) for part in classifier.modules()):
        message = (
            "The model computes in half precision, and is judged as it does. Gradients are scaled on their way back "
            "through it, image by image, so that small ones are not rounded to zero; they keep its rounding."
        )
        found.append(Check(name="half precision", level="note", message=message))
    found += [
        Check(name="test-time defence", level="warning", message=said) for said in honesty.attack_remarks(classifier)
    ]
    return tuple(found)


def _data_notes(remarks: list[str]) -> tuple[Check, ...]:
    return (Check(name="data and class names", level="note", message="; ".join(remarks) + "."),) if remarks else ()


def _superclasses(source: DataSource) -> dict[str, str] | None:
    """Return the superclass of every class in the first tree of the data, if there is one."""
    if source.tree is None:
        return None
    tree = source.tree[0]
    return dict(zip(tree.class_names, tree.superclasses(tree.superclass_level), strict=True))


def _levels(source: DataSource) -> list[dict[str, Any]]:
    """Return, for every level of every tree that tells classes apart, the superclass number of every class."""
    return [
        {"tree": tree.root, "level": level, "of": of.tolist()}
        for tree in source.tree or ()
        for level, of in levels_of(tree, source.class_names)
    ]

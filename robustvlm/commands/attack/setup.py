"""From the words of a command to an attack run that is ready to start or go on, and from its facts to its files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustvlm.attacks import (
    DEFAULT_EPS,
    PRECISIONS,
    Attack,
    ExternalAttack,
    LaneAttack,
    ThreatModel,
    parse_attacks,
    parse_eps,
    parse_norm,
    parse_second_opinion,
    recommended_eot,
    require_fit,
    require_norm,
)
from robustvlm.attacks.catalog import is_foreign
from robustvlm.attacks.goals import GOALS
from robustvlm.attacks.goals.superclass import levels_of
from robustvlm.attacks.honesty import open_gradients
from robustvlm.attacks.oracle import EOT_IF_RANDOM
from robustvlm.commands.attack.config import AttackConfig, Observer
from robustvlm.commands.attack.cost import Budget
from robustvlm.commands.attack.findings import of_results, of_second_opinion
from robustvlm.commands.attack.goal import Aim, check_goal, make_aim
from robustvlm.commands.attack.record import load_run
from robustvlm.commands.attack.run import MODES, STAND_INS, AttackRun, published
from robustvlm.commands.attack.store import Ledger, make_rows, trim_gallery
from robustvlm.commands.attack.summary import Summary, summarise
from robustvlm.commands.attack.view import write_report
from robustvlm.commands.common.inputs import code_facts, describe_data, facts_of, probe_of, remarks_of
from robustvlm.commands.common.store import new_session
from robustvlm.core.device import device_of_rank, resolve_device
from robustvlm.core.files import write_text
from robustvlm.core.ranks import Ranks, current_ranks
from robustvlm.data import DataSource, open_data
from robustvlm.defenses import Classifier, load_classifier
from robustvlm.errors import UserError, nearest
from robustvlm.runs.folder import RunFolder, default_name, opened_by_all
from robustvlm.runs.manifest import Manifest, forget_checksums, make_manifest, write_checksums
from robustvlm.runs.read import write_rows
from robustvlm.runs.records import Check, Estimate

# From the facts of a run to its files: rows, summary, report


def finish(ledger: Ledger, manifest: Manifest, attacks: Sequence[Attack]) -> Summary:
    """Write `results.parquet`, `summary.json` and `report.html` from what the ledger holds; return the summary."""
    config = AttackConfig(**manifest["config"])
    clean = [ledger.clean[index] for index in sorted(ledger.clean)]
    found = list(ledger.found.values())
    judged = of_results(
        clean,
        found,
        threats=[ThreatModel(config.norm, eps) for eps in config.eps],
        attacks=attacks,
        n_classes=len(manifest["data"]["class_names"]),
        undefended=config.model if published(config.model) else None,
        pixels=3 * config.resolution**2,
    )
    if config.second_opinion is not None:
        judged += of_second_opinion(clean, found, attack=config.second_opinion)
    if ledger.stopped is None:  # what an unfinished run shows need not hold when it goes on
        ledger.add_checks(judged)
    rows = make_rows(clean, found, norm=config.norm, eps=config.eps, attacks=config.attack, goals=config.goals)
    summary = summarise(
        rows,
        manifest,
        cost=ledger.cost,
        checks=list({check.name: check for check in [*ledger.checks, *judged]}.values()),
        unreadable=ledger.unreadable,
        left_out=len(ledger.left_out),
        waiting=_waiting(ledger, manifest),
        unfinished=_unfinished(ledger, manifest),
        estimate=ledger.estimate,
    )
    trim_gallery(ledger.folder.gallery_path)
    forget_checksums(ledger.folder.path)
    write_rows(ledger.folder.results_path, rows)
    write_text(ledger.folder.summary_path, summary.model_dump_json(indent=2) + "\n")
    write_checksums(ledger.folder.path, manifest)
    write_report([ledger.folder.path], ledger.folder.report_path)
    return summary


def _unfinished(ledger: Ledger, manifest: Manifest) -> str | None:
    """Say in one sentence why the session stopped early, and what it did not come to."""
    if ledger.stopped is None:
        return None
    waiting, seen = _waiting(ledger, manifest), len(ledger.seen)
    return f"{ledger.stopped}, with {seen:,} of {seen + waiting:,} images classified" if waiting else ledger.stopped


def _waiting(ledger: Ledger, manifest: Manifest) -> int:
    """Return how many images a run that stopped early has still to classify, as far as that is known."""
    if ledger.stopped is None:
        return 0
    images, limit = manifest["data"]["images"], manifest["config"]["limit"]
    total = min((count for count in (images, limit) if count is not None), default=0)
    return max(0, total - len(ledger.seen))


# An attack run that is ready to start, continue or be estimated, in one process or in several

NOTHING_LEFT = Estimate(images=0, passes_least=0, passes_most=0, seconds_least=0.0, seconds_most=0.0)


@dataclass(frozen=True)
class Prepared:
    """An attack run that is ready to start.

    Under `torchrun` every process prepares and runs it; each takes its share of the images, and rank 0 alone holds the
    lock, reports progress and writes the results.
    """

    config: AttackConfig
    attacks: list[Attack]
    source: DataSource
    classifier: Classifier
    aim: Aim
    folder: RunFolder
    manifest: Manifest

    def run(
        self,
        observer: Observer | None = None,
        *,
        fresh: bool = False,
        resume: bool = False,
        budget: Budget | None = None,
    ) -> Summary:
        """Start or continue the run, write its files and return the summary; of a finished run, return its summary.

        A budget is no part of what defines the run: with a larger one, or none, the same run goes on.
        """
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume) as manifest:
            if self.folder.finished:
                return self._as_finished(ranks)
            with self._working(ranks, observer, budget) as work:
                work.run()
                if ranks.leader:
                    finish(work.ledger, manifest, self.attacks)
            ranks.barrier()
            return load_run(self.folder.path).summary

    def estimate(self, observer: Observer | None = None, *, fresh: bool = False, resume: bool = False) -> Estimate:
        """Return what the attacks will cost, or what is left of them; the clean pass is made for it, and kept."""
        ranks = current_ranks()
        with opened_by_all(self.folder, self.manifest, ranks, fresh=fresh, resume=resume):
            if self.folder.finished:
                return NOTHING_LEFT
            with self._working(ranks, observer, None) as work:
                return work.estimate() or NOTHING_LEFT

    @contextmanager
    def _working(self, ranks: Ranks, observer: Observer | None, budget: Budget | None) -> Iterator[AttackRun]:
        ledger = Ledger(self.folder, rank=ranks.rank, session=ranks.share(new_session()))
        try:
            yield AttackRun(
                config=self.config,
                source=self.source,
                aim=self.aim,
                attacks=self.attacks,
                ledger=ledger,
                observer=(observer if ranks.leader else None) or Observer(),
                framing=self.classifier.framing,
                ranks=ranks,
                budget=budget,
            )
        finally:
            ledger.close()

    def _as_finished(self, ranks: Ranks) -> Summary:
        if ranks.leader and not self.folder.report_path.exists():  # a crash may leave the last file unwritten
            write_report([self.folder.path], self.folder.report_path)
        return load_run(self.folder.path).summary


# From the words of a command to everything an attack run needs; every mistake is found before any work begins

_MOST_DRAWS = 10_000
_MOST_LANES = 65_536
_LARGEST = 2**63 - 1
# Targets that attacks have unless told otherwise; with fewer classes they take one for each.
_PLANNED_TARGETS = 9


def prepare(
    *,
    model: str = "tiny",
    data: str = "emoji",
    classes: Path | None = None,
    templates: Path | None = None,
    tree: Path | None = None,
    goal: str = "misclassify",
    min_cos: float = 0.5,
    attack: str = "apgd-ce,apgd-t",
    second_opinion: str | None = None,
    norm: str = "Linf",
    eps: str | None = None,
    steps: int | None = None,
    restarts: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    lanes: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    eot: int | None = None,
    draws: int | None = None,
    compiled: bool = False,
    resolution: int | None = None,
    save_adversarial: bool = False,
    checks: str = "full",
    out: Path = Path("runs"),
    name: str | None = None,
    command: str = "",
) -> Prepared:
    """Check all settings, open the data, load the model and return a run that is ready to start.

    Cheap checks come first, so that a mistyped option is not found only after a model was loaded.

    Example:
        >>> import tempfile
        >>> run = prepare(attack="pgd", steps=2, limit=4, lanes=4, out=Path(tempfile.mkdtemp()))
        >>> run.run().images.evaluated
        4
    """
    attacks = _attacks(attack, second_opinion, steps=steps, restarts=restarts)
    norm = parse_norm(norm)
    for item in attacks:
        if isinstance(item, ExternalAttack):
            require_norm(item, norm)
    radii = parse_eps(eps if eps is not None else DEFAULT_EPS[norm])
    for _, value in radii:
        ThreatModel(norm, value)
    device = str(device_of_rank(resolve_device(device), current_ranks()))
    lanes = _lanes(lanes, device)
    _check_numbers(limit=limit, seed=seed, resolution=resolution, eot=eot, draws=draws)
    _check_precision(precision, device)
    check_goal(goal, min_cos)
    if checks not in MODES:
        raise UserError(f"unknown --checks '{checks}': {nearest(checks, MODES)}")
    if name is not None:
        RunFolder(out, name)
    source = open_data(data, classes=classes, templates=templates, tree=tree)
    classifier = load_classifier(model, source.class_names, source.templates, device=device)
    size = resolution or classifier.image_size
    model_facts = facts_of(classifier, "can_reject") | code_facts(_own(goal, attacks))
    data_facts = describe_data(source) | {"superclasses": _superclasses(source), "levels": _levels(source)}
    probe = probe_of(classifier, source.class_names, source.templates, resolution=size)
    opened = open_gradients(classifier)
    aim = make_aim(goal, source=source, classifier=classifier, resolution=size, min_cos=min_cos)
    remarks = remarks_of(source, classifier.vlm)
    aim = dataclasses.replace(aim, notes=(*_notes(opened, classifier), *_data_notes(remarks)))
    _require_ball(norm, radii, size)
    _require_fit(attacks, aim, ThreatModel(norm, radii[0][1]), n_classes=len(source.class_names))
    config = AttackConfig(
        model=model,
        data=data,
        classes=None if classes is None else str(classes),
        templates=None if templates is None else str(templates),
        tree=None if tree is None else str(tree),
        goal=aim.spec,
        goals=[item.spec for item in aim.goals],
        min_cos=min_cos,
        attack=[item.name for item in attacks],
        second_opinion=None if second_opinion is None else attacks[-1].name,
        norm=norm,
        eps=[value for _, value in radii],
        eps_text=[text for text, _ in radii],
        steps=steps,
        restarts=restarts,
        limit=limit,
        seed=seed,
        lanes=lanes,
        device=device,
        precision=precision,
        eot=eot,
        eot_if_random=max(EOT_IF_RANDOM, recommended_eot(attack)),
        draws=draws,
        compiled=compiled,
        resolution=size,
        save_adversarial=save_adversarial,
        checks=checks,
    )
    identity = config.model_dump() | {"model facts": model_facts, "data facts": data_facts}
    folder = RunFolder(out, name or default_name("attack", model, data, identity))
    manifest = make_manifest(
        kind="attack",
        name=folder.name,
        command=command,
        config=config,
        model=model_facts,
        data=data_facts,
        probe=probe,
    )
    manifest["remarks"] = remarks
    _require_text(manifest)
    return Prepared(config, attacks, source, classifier, aim, folder, manifest)


def _attacks(text: str, second_opinion: str | None, *, steps: int | None, restarts: int | None) -> list[Attack]:
    """Return the attacks in order, the second opinion last: it so gets the images that all others have left."""
    attacks = parse_attacks(text, steps=steps, restarts=restarts)
    if second_opinion is None:
        return attacks
    last = parse_second_opinion(second_opinion)
    if last.name in [item.name for item in attacks]:
        raise UserError(f"the second opinion '{last.name}' is among the attacks already: name it in one place")
    return [*attacks, last]


def _own(goal: str, attacks: list[Attack]) -> list[str]:
    """Return the names among these that stand for code of the user's."""
    own = [item.name for item in attacks if isinstance(item, LaneAttack) and is_foreign(item)]
    return own + ([goal] if goal.partition(":")[0] not in GOALS else [])


def _require_fit(attacks: list[Attack], aim: Aim, threat: ThreatModel, *, n_classes: int) -> None:
    for item in attacks:
        if isinstance(item, ExternalAttack):
            for goal in aim.goals:
                require_fit(item, threat, n_classes=n_classes, goal=goal)
        elif (getattr(item, "n_targets", None) or 0) > max(n_classes - 1, _PLANNED_TARGETS):
            raise UserError(
                f"attack '{item.name}' asks for more targets than there are wrong classes: "
                f"pass targets={max(n_classes - 1, 1)} or fewer"
            )


def _require_ball(norm: str, radii: list[tuple[str, float]], size: int) -> None:
    """Refuse L2 balls that hold every image there is: the number was meant for another scale of pixels."""
    text, largest = radii[-1]
    whole = math.sqrt(3 * size * size)
    if norm == "L2" and largest > whole:
        raise UserError(
            f"eps {text} is larger than the distance of any two images of {size} x {size} pixels in [0, 1], which is "
            f"{whole:.4g}: for grey levels pass {text}/255"
        )


def _lanes(lanes: int | None, device: str) -> int:
    if lanes is None:
        return 256 if device.startswith("cuda") else 64
    if lanes < 1:
        raise UserError(f"--lanes must be at least 1, got {lanes}")
    if lanes > _MOST_LANES:
        raise UserError(f"--lanes must be at most {_MOST_LANES:,} images in one batch, got {lanes:,}")
    return lanes


def _check_numbers(*, limit: int | None, seed: int, resolution: int | None, eot: int | None, draws: int | None) -> None:
    for option, count in (("--eot", eot), ("--draws", draws)):
        if count is not None and not 1 <= count <= _MOST_DRAWS:
            raise UserError(f"{option} must be between 1 and {_MOST_DRAWS:,} draws of the model, got {count:,}")
    if limit is not None and not 1 <= limit <= _LARGEST:
        raise UserError(f"--limit must be at least 1 image, and less than 2^63, got {limit}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    if seed > _LARGEST:
        raise UserError(f"--seed must be less than 2^63, got {seed}")
    if resolution is not None and not 8 <= resolution <= 4096:
        raise UserError(f"--resolution must be between 8 and 4096 pixels, got {resolution}")


def _check_precision(precision: str, device: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}': {nearest(precision, PRECISIONS)}")
    if precision == "fp64" and device.startswith("mps"):
        raise UserError("--precision fp64: the device 'mps' has no 64-bit numbers; pass fp32, or --device cpu")


def _require_text(manifest: Manifest) -> None:
    """Refuse file names that are no text, as Linux allows: they could not be written down in any file of the run."""
    try:
        json.dumps(manifest, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(error.object[max(0, error.start - 30) : error.end + 10])
        raise UserError(f"a path or name in the settings is not valid text (UTF-8), near {shown}: rename it") from None


def _notes(opened: list[str], classifier: Classifier) -> tuple[Check, ...]:
    found = []
    if opened:
        said = "; ".join(opened)
        found.append(Check(name=STAND_INS, level="note", message=f"{said[0].upper()}{said[1:]}."))
    if any(getattr(part, "in_half", False) for part in classifier.modules()):
        message = (
            "The model computes in half precision, and is judged as it does. Gradients are scaled on their way back "
            "through it, image by image, so that small ones are not rounded to zero; they keep its rounding."
        )
        found.append(Check(name="half precision", level="note", message=message))
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

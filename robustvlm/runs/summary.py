"""The content of `summary.json`: the one place where a run's rows become the numbers that are shown."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustvlm.runs.levels import level_summaries, level_transfer, tree_levels
from robustvlm.runs.records import (
    Acceptance,
    AttackSummary,
    Check,
    Cosine,
    Cost,
    EpsSummary,
    Estimate,
    GroupSummary,
    Images,
    Level,
    Passes,
    Summary,
    UnreadableImage,
)
from robustvlm.runs.verdicts import (
    NO_ANSWER,
    REJECTED,
    ImageVerdict,
    Outcome,
    Point,
    Rows,
    Verdicts,
    columns,
    verdicts,
    worst_points,
)
from robustvlm.stats import Rate, mean, rate

__all__ = [
    "Acceptance",
    "AttackSummary",
    "Check",
    "Cosine",
    "Cost",
    "EpsSummary",
    "Estimate",
    "GroupSummary",
    "Images",
    "Level",
    "Passes",
    "Summary",
    "UnreadableImage",
    "summarise",
]


def summarise(
    rows: Rows,
    manifest: Mapping[str, Any],
    *,
    cost: Cost | None = None,
    checks: Sequence[Check] = (),
    unreadable: Sequence[UnreadableImage] = (),
    left_out: int = 0,
    waiting: int = 0,
    unfinished: str | None = None,
    estimate: Estimate | None = None,
) -> Summary:
    """Return the summary of result rows (an Arrow table or a list of dicts) under their manifest.

    Every rate has its exact 95 % interval. Classes without an image are left out. `waiting` images are not classified
    yet: they count as wrong, and as right in what rates are at most.

    Example:
        >>> manifest = {"config": {"norm": "Linf", "eps": [0.1], "eps_text": ["0.1"], "attack": ["pgd"]},
        ...             "data": {"class_names": ["cat", "dog"], "superclasses": None}}
        >>> row = {"index": 0, "image_id": "a", "label": 1, "clean_prediction": 1, "attack": "pgd", "eps": 0.1,
        ...        "outcome": "fooled", "steps": 3, "passes": 4}
        >>> summarise([row], manifest).per_eps[0].attack_success_rate.value
        1.0
    """
    config = manifest["config"]
    goals = config.get("goals") or ["misclassify"]
    table = verdicts(rows, eps=config["eps"], attacks=config["attack"], goal=goals[0])
    texts = dict(zip(map(float, config["eps"]), config["eps_text"], strict=True))
    work = _work(rows, goals[0])
    correct = sum(image.clean_correct for image in table.images)
    return Summary(
        norm=config["norm"],
        goal=config.get("goal") or "misclassify",
        min_cos=config.get("min_cos") if goals[0] == "feature" else None,
        can_reject=bool((manifest.get("model") or {}).get("can_reject")),
        images=Images(
            evaluated=len(table.images),
            unreadable=len(unreadable),
            clean_correct=correct,
            exposed=sum(image.exposed for image in table.images),
            left_out=left_out,
            waiting=waiting,
        ),
        clean_accuracy=rate(correct, len(table.images) + waiting),
        clean_accuracy_at_most=rate(correct + waiting, len(table.images) + waiting) if waiting else None,
        per_eps=[
            _at_eps(table, i, text=texts.get(eps, f"{eps:g}"), work=work, rows=rows, manifest=manifest, waiting=waiting)
            for i, eps in enumerate(table.eps)
        ],
        cost=cost or Cost(),
        checks=list(checks),
        unreadable=list(unreadable),
        unfinished=unfinished,
        estimate=estimate,
    )


def _work(rows: Rows, goal: str) -> dict[tuple[float, str], Counter[str]]:
    """Count, per eps and attack, the goal's rows of each outcome and the steps and passes they took."""
    work: dict[tuple[float, str], Counter[str]] = defaultdict(Counter)
    fields = columns(rows, "eps", "attack", "goal", "outcome", "steps", "passes")
    for eps, attack, of, outcome, steps, passes in fields:
        if of == goal:
            work[float(eps), attack].update({outcome: 1, "steps": steps, "passes": passes})
    return work


def _at_eps(
    table: Verdicts,
    index: int,
    *,
    text: str,
    work: Mapping[tuple[float, str], Counter[str]],
    rows: Rows,
    manifest: Mapping[str, Any],
    waiting: int,
) -> EpsSummary:
    data, config = manifest["data"], manifest["config"]
    goals = config.get("goals") or ["misclassify"]
    levels = tree_levels(data) if any(image.label >= 0 for image in table.images) else []
    outcomes = [(image, table.after(image, index)) for image in table.images]
    count = Counter(outcome for _, outcome in outcomes)
    count["undecided"] += waiting
    total, attacked = len(outcomes) + waiting, count["fooled"] + count["robust"] + count["undecided"]
    features = goals[0].startswith("feature")
    # Feature goals look at the encoder, below any refusal.
    refuses = bool((manifest.get("model") or {}).get("can_reject")) and not features
    recorded = worst_points(rows, goals[0], table.eps[index]) if refuses or features else []
    names: list[str] = data["class_names"]
    superclasses: Mapping[str, str] = data.get("superclasses") or {}
    return EpsSummary(
        eps=table.eps[index],
        eps_text=text,
        fooled=count["fooled"],
        robust=count["robust"],
        undecided=count["undecided"],
        robust_accuracy=rate(count["robust"], total),
        robust_accuracy_at_most=rate(count["robust"] + count["undecided"], total),
        attack_success_rate=_success_rate(count),
        attack_success_rate_at_least=rate(count["fooled"], attacked),
        attack_success_rate_at_most=rate(count["fooled"] + count["undecided"], attacked),
        per_attack=[
            _attack(table, index, j, work[table.eps[index], name], waiting) for j, name in enumerate(table.attacks)
        ],
        per_class=_groups(outcomes, lambda image: names[image.label] if image.label >= 0 else None),
        per_superclass=_groups(
            outcomes, lambda image: superclasses.get(names[image.label]) if image.label >= 0 else None
        ),
        levels=level_summaries(rows, table, index, levels, waiting=waiting) if len(goals) == 1 else [],
        transfer=level_transfer(rows, goals, index, levels, config, waiting=waiting)
        if len(goals) > 1 and levels
        else None,
        cosine=_cosine(recorded) if features else None,
        acceptance=_acceptance(recorded) if refuses else None,
    )


def _cosine(recorded: Sequence[Point]) -> Cosine | None:
    known = [point for point in recorded if point.cosine is not None and math.isfinite(point.cosine)]
    if not known:
        return None
    return Cosine(clean=mean([point.clean_cosine for point in known]), attacked=mean([p.cosine for p in known]))


def _acceptance(recorded: Sequence[Point]) -> Acceptance:
    clean = Counter(point.clean_prediction == REJECTED for point in recorded if point.clean_prediction != NO_ANSWER)
    after = Counter(point.prediction == REJECTED for point in recorded if point.prediction != NO_ANSWER)
    return Acceptance(
        clean_accepted=clean[False], clean_rejected=clean[True], accepted=after[False], rejected=after[True]
    )


def _attack(table: Verdicts, eps_index: int, attack_index: int, done: Counter[str], waiting: int) -> AttackSummary:
    after = Counter(table.after(image, eps_index, attack_index) for image in table.images)
    total, held = len(table.images) + waiting, after["robust"]
    return AttackSummary(
        attack=table.attacks[attack_index],
        attacked=done["fooled"] + done["robust"] + done["failed"],
        fooled=done["fooled"],
        failed=done["failed"],
        robust_accuracy_after=rate(held, total),
        robust_accuracy_after_at_most=rate(held + after["undecided"] + waiting, total),
        steps=done["steps"],
        passes=done["passes"],
    )


def _groups(
    outcomes: Sequence[tuple[ImageVerdict, Outcome]], name_of: Callable[[ImageVerdict], str | None]
) -> list[GroupSummary]:
    """Summarise the images of each name, names in alphabetical order; images without a name are left out."""
    counts: dict[str, Counter[Outcome]] = defaultdict(Counter)
    for image, outcome in outcomes:
        name = name_of(image)
        if name is not None:
            counts[name][outcome] += 1
    return [_group(name, counts[name]) for name in sorted(counts)]


def _group(name: str, count: Counter[Outcome]) -> GroupSummary:
    images = count.total()
    return GroupSummary(
        name=name,
        images=images,
        clean_correct=images - count["clean_wrong"],
        fooled=count["fooled"],
        undecided=count["undecided"],
        attack_success_rate=_success_rate(count),
    )


def _success_rate(count: Counter[Outcome]) -> Rate:
    return rate(count["fooled"], count["fooled"] + count["robust"])

"""What a row of the table reads off a finished command: a few numbers, each with its interval and image count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robustvlm.stats import Rate


@dataclass(frozen=True)
class Reading:
    """One number: what it is, its value with its 95 % interval if it has one, and how many images it is of."""

    what: str
    value: str
    images: int


def share(what: str, found: Rate) -> Reading:
    """Return a proportion with its exact binomial interval.

    Example:
        >>> from robustvlm.stats import rate
        >>> share("accuracy", rate(8, 10))
        Reading(what='accuracy', value='.800 (.444 to .975)', images=10)
    """
    if found.value is None:
        return Reading(what, "no images", 0)
    return Reading(what, f"{_short(found.value)} ({_short(found.low)} to {_short(found.high)})", found.total)


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 1 else "1"


def clean(result: Any) -> list[Reading]:
    """Of `evaluate`: accuracy of classes and of one level of superclasses, calibration, refusals."""
    found = [share(f"accuracy, {result.classes} classes", result.accuracy)]
    levels = [level for level in result.superclass_accuracy if level.superclasses >= 20]
    if levels:
        top = levels[-1]
        found.append(share(f"accuracy, {top.superclasses} superclasses", top.accuracy))
    found.append(Reading("calibration error", _short(result.calibration_error), result.images))
    if result.rejected is not None:
        found.append(share("known images refused", result.rejected))
    return found


def answers(result: Any) -> list[Reading]:
    """Of `evaluate`: accuracy alone, and refusals of a model that may refuse."""
    return [item for item in clean(result) if "superclasses" not in item.what and "calibration" not in item.what]


def curve(run: Any) -> list[Reading]:
    """Of `attack`: what is right when clean, and what withstands at every radius."""
    kept = "right" if run.summary.goal == "misclassify" else "kept"
    found = [share(f"{kept}, clean", run.summary.clean_accuracy)] if kept == "right" else []
    return found + [share(f"{kept} at {point.eps_text}", point.robust_accuracy) for point in run.summary.per_eps]


def certified(run: Any) -> list[Reading]:
    """Of `certify`: mean radius, and the share certified at the first radii (and right, of claims about classes)."""
    summary = run.summary
    about_class = summary.facts.about_class
    found = [Reading("mean certified l2 radius", f"{summary.mean_radius:.3f}", summary.images)]
    if about_class and summary.correct is not None:
        found.append(share("right behind noise", summary.correct))
    for point in summary.at[:2]:
        counted = point.correct if about_class and point.correct is not None else point.certified
        found.append(share(f"certified{' and right' if about_class else ''} at {point.radius:g}", counted))
    return found


SHOWN = ("mcm", "max-logit", "neglabel", "s-dis")


def told_apart(run: Any) -> list[Reading]:
    """Of `detect`: AUROC of the scores that need no images of known classes, on each set of unknown ones."""
    known = run.summary.known.images
    sizes = {part.name: part.images for part in run.summary.unknown}
    found = []
    for score in run.summary.scores:
        if score.name not in (*SHOWN, "own", run.summary.best):
            continue
        for point in score.on:
            interval = f"{_short(point.auroc.value)} ({_short(point.auroc.low)} to {_short(point.auroc.high)})"
            best = ", the best" if score.name == run.summary.best else ""
            what = f"AUROC of {score.name}{best}, {point.unknown}"
            found.append(Reading(what, interval, known + sizes[point.unknown]))
    own = run.summary.own
    if own is not None:
        found.append(share("known accepted", own.accepted_known))
        found += [share(f"{name} accepted", accepted) for name, accepted in own.accepted_unknown.items()]
    return found


def antibodies(run: Any) -> list[Reading]:
    """Of `immunize` without images: how many texts beside the classes it keeps."""
    return [Reading("antibodies kept", str(len(run.summary.antibodies["kept"])), 0)]


def trained(run: Any) -> list[Reading]:
    """Of `finetune` and `purify`: steps, and the kept weights' own measures on the validation images."""
    history = run.summary.history
    found = [Reading("optimiser steps", str(run.summary.steps), 0)]
    best = history.best()
    return found + [
        share(f"{name}, validation", value)
        for name, value in (best.measures if best else {}).items()
        if isinstance(value, Rate)
    ]


def put_together(run: Any) -> list[Reading]:
    """Of `build`: its parts, and whether they fit."""
    return [Reading("parts", f"{len(run.summary.parts)}, {len(run.summary.misfits)} misfits", 0)]

"""What tables and bars of every report show, as plain values: the templates only place them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustvlm.report.words import DASH, duration, forecast, interval, percent, plain
from robustvlm.runs.records import Check, Cost, Estimate
from robustvlm.stats import Rate

LEVELS = {"fault": ("✕", "fault"), "warning": ("!", "warning"), "note": ("i", "note"), "ok": ("✓", "passed")}
"""Sign and word of each level of a check, gravest first."""


@dataclass(frozen=True)
class Bar:
    """A rate as a bar: lengths in percent, the numbers in words."""

    name: str
    value: float
    low: float
    high: float
    text: str
    interval: str
    count: str


def bar(name: str, rate: Rate) -> Bar:
    """Return a rate as a bar; nothing counted gives an empty bar.

    Example:
        >>> from robustvlm.stats import rate
        >>> b = bar("cat", rate(1, 2))
        >>> (b.value, b.text, b.count)
        (50.0, '50.0%', '1 of 2')
    """
    return Bar(
        name=plain(name, 56),
        value=round(100 * (rate.value or 0.0), 3),
        low=round(100 * rate.low, 3),
        high=round(100 * rate.high, 3),
        text=percent(rate.value),
        interval=interval(rate) if rate.total else DASH,
        count=f"{rate.successes:,} of {rate.total:,}",
    )


_MEANINGS = {
    "finite output": "NaN or infinite logits would hide both success and failure.",
    "repeatable output": (
        "A random model needs attacks that average over its draws; otherwise success is overstated,"
        " or robustness is luck."
    ),
    "independent images": "If images influenced each other, every number would depend on how they were batched.",
    "useful gradients": "Where the gradient is zero, an image looks robust only because the attack was blind.",
    "inside the ball": "An adversarial image counts only if its perturbation is within the stated size.",
    "size of the radius": "An attack that cannot move cannot succeed.",
    "failed images": "They count as not robust, and are left out of the attack success rate.",
    "logits": "Attacks climb along losses of logits; probabilities have lost what they need.",
    "gradient against noise": "A gradient that does no better than noise shows the attack no way.",
    "gradient as stated": "An attack that is not shown the whole model cannot attack the whole model.",
    "input range": "A model that is fed another range than it was made for is not the model one means to attack.",
    "black box against white box": "A search that knows no gradient should not find what gradients miss.",
    "attack strength": "Models without adversarial training do not withstand perturbations of this size.",
    "larger radius": "A larger ball contains the smaller one, so an attack in it must find at least as much.",
    "more steps": "More steps must find at least as much.",
    "search at random": "An attack that climbs must do better than points drawn at random.",
    "huge radius": "Any image becomes plain grey in a ball this large, so nothing can be robust in it.",
}


@dataclass(frozen=True)
class Finding:
    """A check as shown: its sign, what it found, and what that means for the reader."""

    level: str
    sign: str
    word: str
    name: str
    message: str
    meaning: str


def finding(level: str, message: str, name: str = "") -> Finding:
    """Return something that a reader should know, at one of LEVELS."""
    return Finding(level, *LEVELS[level], name=name, message=message, meaning="")


def findings(checks: Sequence[Check]) -> list[Finding]:
    """Return the checks, gravest first, with the meaning of those that are known."""
    gravity = list(LEVELS)
    return [
        Finding(
            level=check.level,
            sign=LEVELS[check.level][0],
            word=LEVELS[check.level][1],
            name=plain(check.name, 80),
            message=plain(check.message, 600),
            meaning=_MEANINGS.get(check.name, ""),
        )
        for check in sorted(checks, key=lambda check: gravity.index(check.level))
    ]


_MADE_FOR = {
    "images": "rows of images under attack",
    "spare": "spare rows, and work lost when a session ended",
    "clean": "clean images",
    "questions": "questions to the model before the attacks",
    "checks": "extra attacks of the checks",
    "untold": "not told apart by an earlier version",
}


def pass_rows(cost: Cost) -> list[tuple[str, int]]:
    """Return what the encoder passes of a run were made for, and their sum last; nothing where that is not known."""
    passes = cost.passes
    if passes is None:
        return []
    counts = passes.model_dump()
    shown = [(label, counts[name]) for name, label in _MADE_FOR.items() if counts[name] or name == "images"]
    return [*shown, ("together, forward and backward", passes.total)]


def cost_rows(cost: Cost, estimate: Estimate | None = None) -> list[tuple[str, str]]:
    """Return what the run cost and was expected to cost, as label and value."""
    expected = [("Forecast of the attacks", forecast(estimate))] if estimate is not None else []
    share = f" ({percent(cost.model_seconds / cost.seconds)} of it inside the model)" if cost.seconds else ""
    return [
        ("Forward passes", f"{cost.forward_passes:,}"),
        ("Backward passes", f"{cost.backward_passes:,}"),
        *((f"Passes: {label}", f"{count:,}") for label, count in pass_rows(cost)),
        ("Time", duration(cost.seconds) + share),
        ("Passes per second", f"{cost.passes_per_second:,.0f}"),
        *expected,
    ]


def manifest_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the manifest as dotted keys and values; long lists are cut, for the file itself holds them.

    Example:
        >>> manifest_rows({"config": {"eps": [0.1], "seed": 0}})
        [('config.eps', '[0.1]'), ('config.seed', '0')]
    """
    rows: list[tuple[str, str]] = []
    for key, value in manifest.items():
        if isinstance(value, Mapping) and value and key != "superclasses":
            rows += [(f"{plain(key, 60)}.{inner}", text) for inner, text in manifest_rows(value)]
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            rows.append((plain(key, 60), plain(text, 300)))
    return rows

"""Numbers in plain words, and what tables and bars show as plain values; the terminal and every report use these."""

import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustvlm.runs.records import Check, Cost, Estimate
from robustvlm.stats import Mean, Rate
from robustvlm.text import floor_to, format_between

NORMS = {"Linf": "L∞", "L2": "L₂"}

DASH = "\N{EM DASH}"
RANGE = "\N{EN DASH}"


def plain(text: object, limit: int = 200) -> str:
    """Return `text` on one line without control or direction-changing characters, cut to `limit` characters.

    Class names, paths and model specs come from outside; they must not move the cursor or reverse a line.

    Example:
        >>> plain("a\\x1b[31m\\nb")
        'a [31m b'
        >>> plain("abcdef", limit=4)
        'abc…'
    """
    shown = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in str(text))
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def sentence(text: str) -> str:
    """Return `text` with a capital first letter.

    Example:
        >>> sentence("not seen as Big Ben")
        'Not seen as Big Ben'
    """
    return text[:1].upper() + text[1:]


def count_of(number: int, things: str) -> str:
    """Return a number with what it counts, which is given in the plural; of one, the singular.

    Example:
        >>> count_of(1, "images"), count_of(2500, "images"), count_of(1, "encoder passes"), count_of(0, "classes")
        ('1 image', '2,500 images', '1 encoder pass', '0 classes')
    """
    return f"{number:,} {things if number != 1 else things.removesuffix('es' if things.endswith('sses') else 's')}"


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage with one decimal, or a dash for none; only none is 0%, only all 100%.

    Example:
        >>> (percent(0.8264), percent(1.0), percent(None))
        ('82.6%', '100%', '—')
        >>> (percent(1e-5), percent(0.9999))
        ('<0.1%', '>99.9%')
    """
    if value is None:
        return DASH
    if value in (0, 1):
        return "100%" if value else "0%"
    shown = f"{100 * value:.1f}%"
    if shown == "0.0%":
        return "<0.1%"
    return ">99.9%" if shown == "100.0%" and value < 1 else shown


def interval(rate: Rate) -> str:
    """Return the interval of a rate as percentages, rounded outwards: what is printed covers what was computed.

    Example:
        >>> interval(Rate(successes=8, total=10, value=0.8, low=0.4439, high=0.9748)).replace(RANGE, " to ")
        '44.3 to 97.5%'
    """
    low, high = floor_to(rate.low), -floor_to(-rate.high)
    return f"{percent(low).removesuffix('%')}{RANGE}{percent(high)}"


def as_rate(found: Mean) -> Rate:
    """Return a mean in [0, 1] as a share, to be shown as shares are; without an interval it may be anything.

    Example:
        >>> interval(as_rate(Mean(total=1, value=0.5, low=None, high=None))).replace(RANGE, " to ")
        '0 to 100%'
    """
    value, total = found.value or 0.0, max(found.total, 1)
    low, high = 0.0 if found.low is None else found.low, 1.0 if found.high is None else found.high
    return Rate(successes=round(value * total), total=total, value=value, low=low, high=high, method=found.method)


def copies_counted(data: object) -> str:
    """Say of the bundled data, whose drawings stand in it in several copies, that intervals count each; else "".

    It is for runs of earlier versions, whose intervals take images one by one.

    Example:
        >>> copies_counted("parquet:emoji.parquet"), copies_counted("emoji?copies=1")
        ('', '')
        >>> copies_counted("emoji?split=test")[:57]
        'Intervals count every image: the bundled data have copies'
    """
    name, _, options = str(data).partition("?")
    if name != "emoji" or "copies=1" in options.split("&"):
        return ""
    return (
        "Intervals count every image: the bundled data have copies of each drawing, which are no independent evidence, "
        "and for statements about drawings in general the intervals are too narrow."
    )


def norm_name(norm: str) -> str:
    """Return the written form of a norm: L∞ for "Linf"."""
    return NORMS.get(norm, plain(norm))


def ball(norm: str, eps_text: str) -> str:
    """Say in words which perturbations are allowed.

    Example:
        >>> ball("Linf", "2/255")
        'A change of at most 2/255 in every colour value (L∞)'
    """
    eps = plain(eps_text)
    if norm == "Linf":
        return f"A change of at most {eps} in every colour value (L∞)"
    if norm == "L2":
        return f"A change of Euclidean length at most {eps} over the image (L₂)"
    return f"A change of {norm_name(norm)} size at most {eps}"


def duration(seconds: float) -> str:
    """Return a time span as a person would say it.

    Example:
        >>> [duration(s) for s in (0.234, 12.34, 125, 7384)]
        ['0.23 s', '12.3 s', '2 min 5 s', '2 h 3 min']
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(iso: str) -> str:
    """Return an ISO time as a person would write it.

    Example:
        >>> moment("2025-01-31T12:00:05+00:00")
        '2025-01-31 12:00:05 UTC'
    """
    return plain(iso, 40).replace("T", " ").replace("+00:00", " UTC")


def number(mean: Mean) -> str:
    """Return a mean with its interval, rounded outwards.

    Example:
        >>> number(Mean(total=9, value=0.5, low=0.4006, high=0.6)).replace(RANGE, " to ")
        '0.500 (0.400 to 0.600)'
    """
    if mean.value is None:
        return DASH
    reach = "" if mean.low is None or mean.high is None else f" ({RANGE.join(format_between(mean.low, mean.high))})"
    return f"{mean.value:.3f}{reach}"


def bounds(least: Rate, most: Rate | None) -> str:
    """Return a share that lies between two rates, as "a - b".

    Example:
        >>> from robustvlm.stats import rate
        >>> bounds(rate(1, 4), rate(3, 4)).replace(RANGE, "to")
        '25.0% to 75.0%'
    """
    return f"{percent(least.value)} {RANGE} {percent((most or least).value)}"


def forecast(estimate: Estimate) -> str:
    """Say what the attacks will cost, in one sentence.

    Example:
        >>> forecast(Estimate(images=80, passes_least=160, passes_most=16160, seconds_least=0.4, seconds_most=41))
        '80 images to attack: at most 16,160 encoder passes (about 41.0 s), at least 160 (0.40 s).'
        >>> forecast(Estimate(images=0, passes_least=0, passes_most=0, seconds_least=0, seconds_most=0))
        'Nothing is left to attack.'
    """
    if not estimate.images:
        return "Nothing is left to attack."
    looks = "; second looks at more than one apparent success of an image come on top" if estimate.second_looks else ""
    others = f"; on top of it {', '.join(map(plain, estimate.unknown))}, of unknown cost" if estimate.unknown else ""
    return (
        f"{count_of(estimate.images, 'images')} to attack: at most {estimate.passes_most:,} "
        f"encoder passes (about {duration(estimate.seconds_most)}), at least {estimate.passes_least:,} "
        f"({duration(estimate.seconds_least)}){looks}{others}."
    )


# What tables and bars of every report show, as plain values: whoever draws only places them

LEVELS = {"fault": ("✕", "fault"), "warning": ("!", "warning"), "note": ("i", "note"), "ok": ("✓", "passed")}
"""Sign and word of each level of a check, gravest first."""


@dataclass(frozen=True)
class Bar:
    """A rate as a bar: lengths in percent, the numbers in words, and with all their digits (value, low, high)."""

    name: str
    value: float
    low: float
    high: float
    text: str
    interval: str
    count: str
    shares: tuple[float | None, float | None, float | None] = (None, None, None)


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
        shares=(rate.value, rate.low, rate.high) if rate.total else (None, None, None),
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
    "copies": "Pictures of one thing stand and fall together, so that many of them are less evidence than they seem.",
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
        *_likely_rows(cost, estimate),
    ]


def _likely_rows(cost: Cost, estimate: Estimate | None) -> list[tuple[str, str]]:
    """Return what the run's first answers let expect beside what it became, where they said something."""
    if estimate is None or estimate.likely_least is None or estimate.likely_most is None:
        return []
    became = cost.forward_passes + cost.backward_passes
    said = f"{likely_passes(estimate.likely_least, estimate.likely_most)}, said after {estimate.likely_after:,} answers"
    return [("Likely passes in all, no bound", f"{said}; {became:,} were spent")]


def likely_passes(least: int, most: int) -> str:
    """Say a likely range of passes, to two figures.

    Example:
        >>> likely_passes(12_345, 23_456).replace(RANGE, "to"), likely_passes(940, 941)
        ('12,000 to 24,000', '940')
    """
    low, high = _two_figures(least, math.floor), _two_figures(most, math.ceil)
    return f"{least:,}" if least == most or most - least <= 0.02 * most else f"{low:,} {RANGE} {high:,}"


def _two_figures(count: int, rounded: Callable[[float], int]) -> int:
    scale = 10 ** max(len(str(count)) - 2, 0)
    return rounded(count / scale) * scale


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

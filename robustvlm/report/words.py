"""Numbers in plain words; the terminal and every report say them with these."""

from __future__ import annotations

import unicodedata

from robustvlm.runs.records import Estimate
from robustvlm.stats import Mean, Rate
from robustvlm.text import floor_to

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


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage with one decimal, or a dash for none.

    Example:
        >>> (percent(0.8264), percent(1.0), percent(None))
        ('82.6%', '100%', '—')
    """
    if value is None:
        return DASH
    return "0%" if value == 0 else "100%" if value == 1 else f"{100 * value:.1f}%"


def interval(rate: Rate) -> str:
    """Return the interval of a rate as percentages, rounded outwards: what is printed covers what was computed.

    Example:
        >>> interval(Rate(successes=8, total=10, value=0.8, low=0.4439, high=0.9748)).replace(RANGE, " to ")
        '44.3 to 97.5%'
    """
    low, high = floor_to(rate.low), -floor_to(-rate.high)
    return f"{percent(low).removesuffix('%')}{RANGE}{percent(high)}"


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
    """Return a mean with its interval.

    Example:
        >>> number(Mean(total=9, value=0.5, low=0.4, high=0.6)).replace(RANGE, " to ")
        '0.500 (0.400 to 0.600)'
    """
    if mean.value is None:
        return DASH
    reach = "" if mean.low is None or mean.high is None else f" ({mean.low:.3f}{RANGE}{mean.high:.3f})"
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
    others = f"; on top of it {', '.join(map(plain, estimate.unknown))}, of unknown cost" if estimate.unknown else ""
    return (
        f"{estimate.images:,} image{'s' if estimate.images > 1 else ''} to attack: at most {estimate.passes_most:,} "
        f"encoder passes (about {duration(estimate.seconds_most)}), at least {estimate.passes_least:,} "
        f"({duration(estimate.seconds_least)}){others}."
    )

"""Numbers and findings in plain words; the terminal and the HTML report say the same things with these."""

from __future__ import annotations

import unicodedata

from robustvlm.runs.summary import EpsSummary, Summary
from robustvlm.stats import Rate

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
    """Return the interval of a rate as percentages.

    Example:
        >>> interval(Rate(successes=8, total=10, value=0.8, low=0.4439, high=0.9748)).replace(RANGE, " to ")
        '44.4 to 97.5%'
    """
    low = percent(rate.low).removesuffix("%")
    return f"{low}{RANGE}{percent(rate.high)}"


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


def headline(summary: Summary) -> EpsSummary | None:
    """Return the largest eps, the one the verdict speaks of; None when no eps was run."""
    return summary.per_eps[-1] if summary.per_eps else None


def verdict(summary: Summary) -> str:
    """Return the outcome of a run in one plain sentence, with its interval."""
    at = headline(summary)
    if summary.images.evaluated == 0 or at is None:
        return "No image was evaluated, so nothing can be said."
    if summary.images.clean_correct == 0:
        return "The model was wrong on every image before any attack, so there was nothing to attack."
    rate = at.attack_success_rate
    if rate.total == 0:
        return "The attacks broke on every image, so nothing is known about the model's robustness."
    start = ball(summary.norm, at.eps_text)
    if rate.successes == 0:
        return (
            f"No attack found {start[0].lower()}{start[1:]} that fools the model on any of the {rate.total:,} images"
            f" it gets right (95% interval of the success rate {interval(rate)})."
        )
    return (
        f"{start} is enough to make the model wrong on {percent(rate.value)} of the images it otherwise gets right"
        f" ({rate.successes:,} of {rate.total:,}; 95% interval {interval(rate)})."
    )


def how_many_attacks(n: int) -> str:
    """Return "the attack", "both attacks" or "all n attacks"."""
    return {1: "the attack", 2: "both attacks"}.get(n, f"all {n} attacks")


def smaller_eps(summary: Summary) -> str:
    """Return what already happens at the smallest eps, or "" when there is only one."""
    if len(summary.per_eps) < 2 or summary.per_eps[0].attack_success_rate.total == 0:
        return ""
    at = summary.per_eps[0]
    rate = at.attack_success_rate
    return f"At {plain(at.eps_text)} it is {percent(rate.value)} (95% interval {interval(rate)})."

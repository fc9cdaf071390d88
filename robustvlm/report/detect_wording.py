"""The findings of a detect run in plain words; terminal and report say the same things with these."""

from __future__ import annotations

from robustvlm.report.wording import ball, percent, plain
from robustvlm.runs.detect_summary import AttackedScore, DetectSummary, Measured, OnSet, ScoreSummary

NEEDS = {"images": "images", "words": "words", "encoder": ""}


def number(value: float) -> str:
    """Return a metric in [0, 1] with three digits.

    Example:
        >>> number(0.8456), number(1.0)
        ('.846', '1.000')
    """
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0") else text


def interval(found: Measured) -> str:
    """Return the interval of a metric."""
    return f"{number(found.low)}\N{EN DASH}{number(found.high)}"


def probability(value: float) -> str:
    """Return a p-value.

    Example:
        >>> probability(0.0004), probability(0.25)
        ('<.001', '.250')
    """
    return "<.001" if value < 0.001 else number(value)


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return ("+" if value >= 0 else "\N{MINUS SIGN}") + number(abs(value))


def needs(score: ScoreSummary) -> str:
    """Say what a score needs besides the model, in one or two words."""
    return ", ".join(word for need in score.needs if (word := NEEDS.get(need, need)))


def versus(on: OnSet, titles: dict[str, str]) -> str:
    """Say how a score compares with the best baseline on a set."""
    if on.versus is None:
        return "best baseline"
    baseline = titles.get(on.versus.baseline, on.versus.baseline)
    return f"{signed(on.versus.difference)} to {baseline}, p\N{NO-BREAK SPACE}{probability(on.versus.p_holm)}"


def verdict(summary: DetectSummary) -> str:
    """Say in one sentence which score tells best, and how well."""
    best = next(score for score in summary.scores if score.name == summary.best)
    parts = [
        f"{plain(on.unknown, 40)} {number(on.auroc.value)} (accepting {percent(on.fpr95.value)} of the unknown images)"
        for on in best.on
    ]
    return f"{best.title} tells known from unknown images best: AUROC {', '.join(parts)} at 95% of the known accepted."


def comparison(summary: DetectSummary) -> str:
    """Say on how many sets the best score beats the best baseline beyond chance."""
    best = next(score for score in summary.scores if score.name == summary.best)
    compared = [on for on in best.on if on.versus is not None]
    if not compared:
        return "It is the best of the usual baselines, and no other score does better on average."
    better = [on for on in compared if on.versus is not None and on.versus.p_holm < 0.05 and on.versus.difference > 0]
    sets = f"{len(compared)} set" + ("s" if len(compared) > 1 else "")
    return (
        f"It beats the best baseline of each set beyond chance on {len(better)} of {sets} (paired bootstrap, 5% level, "
        "adjusted for the number of scores)."
    )


def own_sentence(summary: DetectSummary) -> str | None:
    """Say what a model that may refuse decides by itself."""
    if summary.own is None:
        return None
    accepted = ", ".join(
        f"{percent(rate.value)} of {plain(name, 40)}" for name, rate in summary.own.accepted_unknown.items()
    )
    return (
        f"At its own threshold the model accepts {percent(summary.own.accepted_known.value)} of the known images "
        f"({percent(summary.own.right.value)} with the right class), and of the unknown ones {accepted}."
    )


def attack_sentence(summary: DetectSummary) -> str | None:
    """Say what attacks did to the score that held best."""
    if not summary.attacked or summary.norm is None or summary.eps_text is None:
        return None
    best = max(summary.attacked, key=_held)
    sets = ", ".join(f"{number(on.auroc_both.value)} on {plain(on.unknown, 40)}" for on in best.on)
    return (
        f"{ball(summary.norm, summary.eps_text)}, made by somebody who knows the score: of the scores attacked "
        f"{best.title} holds best, with an AUROC of {sets} when known and unknown images are attacked."
    )


def _held(score: AttackedScore) -> float:
    return sum(on.auroc_both.value for on in score.on) / max(1, len(score.on))

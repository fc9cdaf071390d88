"""The findings of a detect run in plain words, as terminal and page say them."""

from __future__ import annotations

from robustvlm.commands.detect.summary import AttackedScore, DetectSummary, OnSet, ScoreSummary
from robustvlm.detect import BASELINES
from robustvlm.report.words import ball, percent, plain

NEEDS = {"images": "images", "words": "words", "encoder": ""}


def needs(score: ScoreSummary) -> str:
    """Say what a score needs besides the model, in one or two words."""
    return ", ".join(word for need in score.needs if (word := NEEDS.get(need, need)))


def versus(on: OnSet, titles: dict[str, str]) -> str:
    """Say how a score compares with the best other baseline on a set."""
    if on.versus is None:
        return "no other baseline"
    baseline = titles.get(on.versus.baseline, on.versus.baseline)
    gap, p = on.versus.difference, on.versus.p_holm
    sign = "+" if gap >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(gap):.3f} to {baseline}, p\N{NO-BREAK SPACE}{'<0.001' if p < 0.001 else f'{p:.3f}'}"


def verdict(summary: DetectSummary) -> str:
    """Say in one sentence which score has the highest AUROC, by which count, and how well it tells.

    On several sets it is the highest mean, which need not be the highest on any of them: the sentence says so.
    """
    best = next(score for score in summary.scores if score.name == summary.best)
    parts = [
        f"{plain(on.unknown, 40)} {on.auroc.value:.3f} (accepting {percent(on.fpr95.value)} of the unknown images)"
        for on in best.on
    ]
    tail = f"AUROC {', '.join(parts)} at 95% of the known accepted."
    if len(best.on) == 1:
        return f"{best.title} has the highest AUROC: {tail}"
    mean = sum(on.auroc.value for on in best.on) / len(best.on)
    first = f"{best.title} has the highest mean AUROC over the {len(best.on)} sets, {mean:.3f}: {tail}"
    higher = []
    for place, on in enumerate(best.on):
        top = max(summary.scores, key=lambda score: score.on[place].auroc.value)
        if top.on[place].auroc.value > on.auroc.value:
            higher.append(f"{top.title} on {plain(on.unknown, 40)}, {top.on[place].auroc.value:.3f}")
    return f"{first} Higher on a set of its own: {'; '.join(higher)}." if higher else first


def comparison(summary: DetectSummary) -> str:
    """Say on how many sets the best score beats the best baseline that is another score beyond chance."""
    best = next(score for score in summary.scores if score.name == summary.best)
    compared = [on.versus for on in best.on if on.versus is not None]
    if not compared:
        return "There is no other baseline to compare it with."
    better = sum(found.p_holm < 0.05 and found.difference > 0 for found in compared)
    titles = {score.name: score.title for score in summary.scores}
    rivals = ", ".join(dict.fromkeys(titles.get(found.baseline, found.baseline) for found in compared))
    own = "It is a usual baseline itself; it" if best.name in BASELINES else "It"
    sets = "the set" if len(compared) == 1 else f"{better} of the {len(compared)} sets"
    beats = "beats" if better else "does not beat"
    where = f"on {sets}" if better or len(compared) == 1 else "on any set"
    return (
        f"{own} {beats} the best other baseline ({rivals}) beyond chance {where} (paired bootstrap, 5% level, "
        "adjusted for the number of scores)."
    )


def tone(summary: DetectSummary) -> str:
    """Return the colour class of the verdict: "held" (green), "" (red) or "neutral".

    Red: on some set the best score's interval reaches down to chance, or it accepts more than half of the unknown
    images. Green: on every set it accepts less than a tenth, by the upper end of the interval, and no check warns.
    """
    best = next(score for score in summary.scores if score.name == summary.best)
    if any(on.auroc.low <= 0.5 or on.fpr95.value > 0.5 for on in best.on):
        return ""
    warned = any(check.level in ("fault", "warning") for check in summary.checks)
    return "held" if not warned and all(on.fpr95.high < 0.1 for on in best.on) else "neutral"


def oracle_titles(summary: DetectSummary) -> list[str]:
    """Return the titles of scores that use words naming what they are tested on."""
    if summary.words is None or not (summary.words.oracle and summary.words.naming):
        return []
    return [score.title for score in summary.scores if "words" in score.needs]


def words_sentence(summary: DetectSummary) -> str | None:
    """Say what became of the words that name classes of unknown sets; None where no score uses words."""
    found = summary.words
    if found is None or not found.naming:
        return None
    if found.oracle:
        return (
            f"Oracle: {', '.join(oracle_titles(summary))} use {len(found.naming)} words that name classes of the "
            "unknown sets (--oracle-words): what they reach is no measure of what they would reach."
        )
    return f"{len(found.naming)} words that name classes of the unknown sets were left out; {found.used:,} were used."


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
    sets = ", ".join(f"{on.auroc_both.value:.3f} on {plain(on.unknown, 40)}" for on in best.on)
    return (
        f"{ball(summary.norm, summary.eps_text)}, made by somebody who knows the score: of the scores attacked "
        f"{best.title} holds best, with an AUROC of {sets} when known and unknown images are attacked."
    )


def _held(score: AttackedScore) -> float:
    return sum(on.auroc_both.value for on in score.on) / max(1, len(score.on))

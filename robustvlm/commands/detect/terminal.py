"""The tables that end `robustvlm detect` in the terminal, and its findings in the words of both terminal and report."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustvlm.commands.detect.summary import AttackedScore, DetectSummary, Measured, OnSet, ScoreSummary
from robustvlm.detect import BASELINES
from robustvlm.report.words import ball, percent, plain

# The findings of a detect run in plain words; terminal and report say the same things with these

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
    """Say how a score compares with the best other baseline on a set."""
    if on.versus is None:
        return "no other baseline"
    baseline = titles.get(on.versus.baseline, on.versus.baseline)
    return f"{signed(on.versus.difference)} to {baseline}, p\N{NO-BREAK SPACE}{probability(on.versus.p_holm)}"


def verdict(summary: DetectSummary) -> str:
    """Say in one sentence which score has the highest AUROC, by which count, and how well it tells.

    On several sets it is the highest mean, which need not be the highest on any of them: the sentence says so.
    """
    best = next(score for score in summary.scores if score.name == summary.best)
    parts = [
        f"{plain(on.unknown, 40)} {number(on.auroc.value)} (accepting {percent(on.fpr95.value)} of the unknown images)"
        for on in best.on
    ]
    tail = f"AUROC {', '.join(parts)} at 95% of the known accepted."
    if len(best.on) == 1:
        return f"{best.title} has the highest AUROC: {tail}"
    mean = sum(on.auroc.value for on in best.on) / len(best.on)
    first = f"{best.title} has the highest mean AUROC over the {len(best.on)} sets, {number(mean)}: {tail}"
    higher = []
    for place, on in enumerate(best.on):
        top = max(summary.scores, key=lambda score: score.on[place].auroc.value)
        if top.on[place].auroc.value > on.auroc.value:
            higher.append(f"{top.title} on {plain(on.unknown, 40)}, {number(top.on[place].auroc.value)}")
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
    sets = ", ".join(f"{number(on.auroc_both.value)} on {plain(on.unknown, 40)}" for on in best.on)
    return (
        f"{ball(summary.norm, summary.eps_text)}, made by somebody who knows the score: of the scores attacked "
        f"{best.title} holds best, with an AUROC of {sets} when known and unknown images are attacked."
    )


def _held(score: AttackedScore) -> float:
    return sum(on.auroc_both.value for on in score.on) / max(1, len(score.on))


# The tables that end `robustvlm detect` in the terminal; the numbers are the summary's

_COLOURS = {"fault": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def detect_table(summary: DetectSummary) -> RenderableType:
    """Return the closing tables of a detect run: every score on every set, attacks, what was skipped, the verdict."""
    parts: list[RenderableType] = [_scores(summary)]
    if summary.attacked:
        parts.append(_attacked(summary))
    if summary.adversarial is not None:
        parts.append(_adversarial(summary))
    parts += [
        Text(f"{check.level}: {check.message}", style=_COLOURS[check.level])
        for check in summary.checks
        if check.level != "ok"
    ]
    parts += [Text(f"skipped {name}: {plain(reason, 200)}", style="dim") for name, reason in summary.skipped.items()]
    if summary.unreadable:
        first = summary.unreadable[0]
        parts.append(Text(f"{len(summary.unreadable):,} images could not be read; the first, {plain(first.id)}"))
    lines = [words_sentence(summary), own_sentence(summary), attack_sentence(summary)]
    parts += [Text(line) for line in (verdict(summary), comparison(summary), *lines) if line]
    return Group(*parts)


def _scores(summary: DetectSummary) -> Table:
    sets = ", ".join(f"{part.images:,} {plain(part.name, 40)}" for part in summary.unknown)
    table = _table(f"Known ({summary.known.images:,} images) against unknown ({sets})")
    table.add_column("score")
    for part in summary.unknown:
        table.add_column(Text(f"AUROC {plain(part.name, 40)}"))
        table.add_column("FPR95")
    table.add_column("needs")
    table.add_column("µs", justify="right")
    oracles = oracle_titles(summary)
    for score in summary.scores:
        cells = [cell for on in score.on for cell in (_measured(on.auroc), _measured(on.fpr95))]
        style = "bold" if score.name == summary.best else ""
        title = f"{score.title} (oracle)" if score.title in oracles else score.title
        table.add_row(title, *cells, needs(score), f"{score.microseconds:.1f}", style=style)
    return table


def _attacked(summary: DetectSummary) -> Table:
    table = _table(f"Under attack (eps {plain(summary.eps_text, 20)}), each score by attacks that know it")
    for name in ("score", "unknown", "AUROC clean", "unknown attacked", "known attacked", "both"):
        table.add_column(name)
    table.add_column("unknown accepted", justify="right")
    table.add_column("known accepted", justify="right")
    for score in summary.attacked:
        for on in score.on:
            aurocs = (on.auroc_clean, on.auroc_intrude, on.auroc_deny, on.auroc_both)
            table.add_row(
                score.title,
                plain(on.unknown, 40),
                *(number(value.value) for value in aurocs),
                f"{percent(on.accepted_clean.value)} -> {percent(on.accepted_attacked.value)}",
                f"{percent(score.accepted_clean.value)} -> {percent(score.accepted_attacked.value)}",
            )
    return table


def _adversarial(summary: DetectSummary) -> Table:
    found = summary.adversarial
    assert found is not None, "asked for after a check"
    table = _table(f"Clean against adversarial images ({found.fooled} fooled of {found.attacked}), blind to the scores")
    table.add_column("score")
    table.add_column("AUROC")
    titles = {score.name: score.title for score in summary.scores}
    for name, value in found.auroc.items():
        table.add_row(titles[name], _measured(value))
    return table


def _measured(found: Measured) -> Text:
    return Text.assemble(number(found.value), (f" {interval(found)}", "dim"))


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)

"""The table of a judgement for a README, an issue or a paper: Markdown and LaTeX; and the table of all defences."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import robustvlm.commands.judge.view as said
from robustvlm.commands.judge.record import Judgement, ModelJudgement
from robustvlm.commands.judge.view import COLUMNS, intervals_of
from robustvlm.core.files import write_text
from robustvlm.defenses.zoo.base import DEFENCES, form_of
from robustvlm.report.copies import escape_latex, escape_markdown, latex_words
from robustvlm.report.words import DASH, ball, interval, percent, plain

OWN_WORDS = "Claimed figures are those of the papers, on other models and images, and answer their own question."


def claims_of(found: ModelJudgement) -> str:
    """Return what was published of a model's defences, with its setting; a dash for nothing."""
    return "; ".join(said.claim_words(claim) for _, about in said.abouts_of(found) for claim in about.claims) or DASH


_LONG = 4000


def fidelity_of(found: ModelJudgement) -> str:
    """Return how near its defences are to the published ones; a dash for an undefended model."""
    return "; ".join(dict.fromkeys(about.fidelity for _, about in said.abouts_of(found))) or DASH


def write_markdown(path: Path, summary: Judgement, manifest: Mapping[str, Any]) -> None:
    """Write the table, a sentence for each defence and what was noticed as Markdown."""
    write_text(path, "\n".join(_markdown(summary, manifest)) + "\n")


def _markdown(summary: Judgement, manifest: Mapping[str, Any]) -> Iterator[str]:
    data = plain((manifest.get("data") or {}).get("spec") or "")
    yield "# Test-time defences, judged"
    yield ""
    yield f"{ball(summary.norm, summary.eps_text)}. {summary.images:,} images of {_code(data)},"
    yield f"{said.effort_of(summary)}. {intervals_of(summary)}"
    if aside := said.left_aside(summary):
        yield escape_markdown(aside, _LONG)
    yield ""
    heads = ["model", "claimed", *COLUMNS, "p", "passes F / B", "cost x", "fidelity"]
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for found in said.ordered_models(summary):
        claims = claims_of(found)
        figures = [f"{percent(figure.value)} ({interval(figure)})" for figure in said.figures_of(found)]
        p = DASH if found.gain_p is None else f"{found.gain_p:.2g}"
        passes = f"{found.facts.forward:g} / {found.facts.backward:g}"
        cost, fidelity = said.cost_of(found, summary), fidelity_of(found)
        yield _line([_code(found.spec), claims, *figures, p, passes, cost, fidelity])
    for row in summary.not_reproduced:
        empty = [DASH] * (len(COLUMNS) + 3)
        yield _line([_code(row.spec), row.claimed, *empty, f"not reproduced: {row.reason}"])
    for found in said.defended_models(summary):
        yield ""
        yield escape_markdown(said.sentence_of(found, summary), _LONG)
        for check in found.checks:
            if check.level in ("warning", "fault"):
                yield f"* {escape_markdown(f'{check.name}: {check.message}', _LONG)}"
    yield ""
    yield OWN_WORDS


def _code(text: str) -> str:
    """Return a name from outside as code; a backtick in it would end that."""
    return f"`{plain(text, 300).replace('`', chr(39))}`"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell, 600).replace("|", "\\|") for cell in cells) + " |"


def table_of_defences() -> str:
    """Return the table of the docs: every defence, how it is written, where it is from, and how near it is.

    Example:
        >>> "| `+bits" in table_of_defences()
        True
    """
    rows = [_line(["operator", "method", "reference", "fidelity", "passes F / B", "random", "gradient modes"])]
    rows.append(_line(["---"] * 7))
    for name, kind in DEFENCES.items():
        about, cost = kind.about, kind().cost()
        passes = f"{cost.forward:g} / {cost.backward:g}"
        drawn = "yes" if kind.random else "no"
        modes = ", ".join(kind.modes)
        cells = [f"`+{form_of(name)}`", about.title, about.reference, about.fidelity, passes, drawn, modes]
        rows.append(_line(cells))
    return "\n".join(rows)


# The same for a paper


def write_tex(path: Path, summary: Judgement, manifest: Mapping[str, Any]) -> None:
    """Write the table as LaTeX, which takes the package booktabs."""
    write_text(path, "\n".join(_tex_lines(summary, manifest)) + "\n")


def _tex_lines(summary: Judgement, manifest: Mapping[str, Any]) -> Iterator[str]:
    heads = ["defence", *COLUMNS, "p", "cost x", "fidelity"]
    data = plain((manifest.get("data") or {}).get("spec") or "")
    yield "% \\usepackage{booktabs}"
    yield r"\begin{table}"
    yield r"\centering\small"
    yield r"\begin{tabular}{l" + "r" * (len(heads) - 2) + "l}"
    yield r"\toprule"
    yield _tex_row(heads)
    yield r"\midrule"
    for found in said.ordered_models(summary):
        figures = [f"{percent(figure.value)} ({interval(figure)})" for figure in said.figures_of(found)]
        p = DASH if found.gain_p is None else f"{found.gain_p:.2g}"
        yield _tex_row([found.spec, *figures, p, said.cost_of(found, summary), fidelity_of(found)])
    for row in summary.not_reproduced:
        yield _tex_row([row.spec, *[DASH] * (len(heads) - 2), "not reproduced"])
    yield r"\bottomrule"
    yield r"\end{tabular}"
    caption = (
        f"Our re-implementations. {ball(summary.norm, summary.eps_text)}; {summary.images:,} images of {data}, "
        f"{said.effort_of(summary)}. Only the worst case is robust accuracy. {intervals_of(summary)}"
    )
    yield r"\caption{" + latex_words(caption) + "}"
    for found in said.defended_models(summary):
        yield ""
        yield r"\par\smallskip " + latex_words(said.sentence_of(found, summary))
        if (claims := claims_of(found)) != DASH:
            yield latex_words(f"Claimed: {claims}.")
    for row in summary.not_reproduced:
        yield ""
        sentence = f"{row.spec} ({row.title}, {row.reference}): not reproduced, {row.reason}. Claimed: {row.claimed}."
        yield r"\par\smallskip " + latex_words(sentence)
    yield ""
    yield r"\par\smallskip " + latex_words(OWN_WORDS)
    yield r"\end{table}"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(escape_latex(cell) for cell in cells) + r" \\"

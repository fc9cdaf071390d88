"""A finished judgement read back, and all that is said of it: in the terminal, on the page, and as Markdown."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from markupsafe import Markup
from rich.console import Console

from robustvlm.commands.judge.attacks import FEATURE, LABEL, MODE, OWN, SHORT, SQUARE, START, TARGETED, UNAWARE
from robustvlm.commands.judge.record import Act, Judgement, ModelJudgement, as_read
from robustvlm.defenses.specs import split_spec
from robustvlm.defenses.zoo.base import DEFENCES, DESCRIPTION, MODES, About, Claim, strengths
from robustvlm.defenses.zoo.base import OWN as OWN_WAY
from robustvlm.report import page, repeat, screen
from robustvlm.report import sections as doc
from robustvlm.report.charts import BAD, GRID, INK, MUTED, SERIES, as_svg, chart, new_figure
from robustvlm.report.words import DASH, ball, count_of, duration, findings, interval, plain
from robustvlm.runs.run import FinishedRun, read_finished
from robustvlm.stats import Rate

_BUNDLED = ("tiny", "tiny-robust")
COLUMNS = ("clean", "unaware: PGD", "unaware: APGD", "own label", "adaptive", "worst = robust")
_CLEARLY = 0.05
_NEAR = 5
"""Points within which an unaware figure is said to be the claimed one."""


def intervals_of(summary: Judgement) -> str:
    """Say what the intervals and the tests are."""
    once = ""
    if summary.worth is not None and summary.worth < summary.images:
        once = f", of {summary.worth:.0f} images: copies of one thing count once"
        tests = [one.protocol for one in summary.models if one.protocol is not None]
        once += ", in p as well" if all(test.things is not None for test in tests) else ", and each on its own in p"
    return (
        f"Intervals are 95%, Clopper-Pearson{once}. p: exact paired test (McNemar) of robust accuracy against the "
        "undefended model on the same images, Holm over the defences of the run."
    )


def read_run(folder: Path) -> FinishedRun[Judgement]:
    """Read a finished judgement back; UserError when it has not ended, is of another kind, or a file is damaged."""
    run = read_finished(folder, "summary.json", Judgement, kind="judge")
    return replace(run, summary=as_read(run.summary))


def show(run: FinishedRun[Judgement], console: Console) -> None:
    """Print the table of a judgement, what was noticed of each defence, and where the report is."""
    files = {"Report": run.report, "Markdown": run.folder / "report.md", "LaTeX": run.folder / "report.tex"}
    closing = doc.Closing(files)
    screen.show(console, judge_report(run), closing)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished judgement, by default to `report.html` in its folder, and return its path."""
    return page.write_report_of(folder, out, lambda run: judge_report(read_run(run)))


def judge_report(run: FinishedRun[Judgement]) -> doc.Report:
    """Return all that is said of a judgement."""
    summary = run.summary
    report = doc.Report(
        kind="judgement of defences",
        name=run.name,
        kicker="Judgement of test-time defences",
        facts=doc.facts_line(run.manifest, f", {summary.images:,} images"),
        verdicts=[doc.Verdict([sentence_of(found, summary)], tone_of(found)) for found in defended_models(summary)],
        sections=[
            doc.Section("The table", list(_table(summary)), key="table", short="Table"),
            *(_section(found, summary) for found in summary.models),
            doc.cost_section([("Images", f"{summary.images:,}"), ("Time", duration(summary.seconds))]),
        ],
        footer=intervals_of(summary),
    )
    return repeat.repeatable(report, run.manifest)


# The words of a judgement


def sentence_of(found: ModelJudgement, summary: Judgement) -> str:
    """Say what was measured of a defence, in a sentence that any author may sign.

    It describes figures, not intentions.
    """
    n, pgd, worst = summary.images, found.unaware[next(iter(UNAWARE))], found.worst
    said = (
        f"{_named(found)}: under attacks that differentiate through the defence, and every other one tried, "
        f"{worst.successes} of {n} images remain right ({interval(worst)}). Under attacks made on the undefended "
        f"model, as in the papers' protocol, {pgd.successes} of {n}."
    )
    gate = reproduction(found, summary)
    return said + _against_none(found) + (f" {gate}" if gate else "")


def reproduction(found: ModelJudgement, summary: Judgement) -> str:
    """Say whether the unaware figure comes near what was claimed for this model and radius; "" without such a claim.

    The claim is of other images as a rule, so that five points say no more than whether to compare at all.
    """
    claims = [claim for _, about in abouts_of(found) for claim in about.claims]
    same = [claim for claim in claims if _is_of(claim, found.spec, summary)]
    partial_ones = any(about.partial for _, about in abouts_of(found))
    if not same or partial_ones or _is_bundled(found) or not _as_released(found.spec):
        return ""
    steps = max(_steps_of(claim) for claim in same)
    if summary.steps < steps:
        return f"What was claimed is under {steps} steps of PGD, here {summary.steps}: compare with --steps {steps}."
    figure = found.unaware[next(iter(UNAWARE))]
    value = 100 * (figure.value or 0.0)
    here = f"here {value:.1f} % ({interval(figure)})"
    low, high = (bound(claim.robust for claim in same) for bound in (min, max))
    if high - low > _NEAR:  # others published figures of the same setting, too
        named = ", ".join(f"{claim.robust:g} % for {claim.data}" for claim in same)
        return f"Published unaware figures of this model and radius differ ({named}), {here}."
    claim = min(same, key=lambda one: abs(value - one.robust))
    stands = f"{claim.robust:g} % claimed for {claim.data}, {here}"
    if abs(value - claim.robust) > _NEAR:
        return (
            f"Our version does not reproduce the claimed unaware figure ({stands}), so that its figures under adaptive "
            "attacks are not to be compared with the paper's."
        )
    return f"Our version comes within {_NEAR} points of the claimed unaware figure ({stands})."


def _steps_of(claim: Claim) -> int:
    """Return the steps of the attack that a claim was made under; 0 where its words do not say."""
    found = re.search(r"PGD-(\d+)", claim.attack)
    return int(found[1]) if found else 0


_CLIP = re.compile(r"(?:CLIP )?(?P<name>(?:ViT-)?[BL]/\d+|RN\d+)")


def _is_of(claim: Claim, spec: str, summary: Judgement) -> bool:
    """Whether a claim is of OpenAI's CLIP that stands in the spec, at this radius, and not of a tuned base."""
    named = _CLIP.fullmatch(claim.model)
    if claim.adaptive or claim.norm != summary.norm or claim.eps is None or named is None:
        return False
    name = named["name"].replace("/", "-")
    given = f"{name if name.startswith(('ViT', 'RN')) else f'ViT-{name}'}/openai"
    return abs(claim.eps / 255 - summary.eps) < 1e-9 and spec.partition("+")[0].lower() == given.lower()


def _as_released(spec: str) -> bool:
    """Whether one defence alone stands behind a model, with its own constants."""
    operations = spec.split("+")[1:]
    return len(operations) == 1 and ":" not in operations[0]


def cost_of(found: ModelJudgement, summary: Judgement) -> str:
    """Return what an answer costs, in answers of the undefended model; a backward pass counts two forward ones."""
    base = summary.of(found.facts.base).facts.equivalents if found.facts.base else found.facts.equivalents
    return f"{found.facts.equivalents / base:.3g}" if base else DASH


def _assumed(found: ModelJudgement) -> Iterator[tuple[str, str]]:
    """Yield the constants that no source gives, by defence."""
    for name, about in abouts_of(found):
        chosen = [item for item in strengths(DEFENCES[name]) if item.strength.origin == "A"]
        if chosen and about.fidelity != OWN_WAY:
            yield name, "; ".join(f"{item.name} ({item.strength.meaning})" for item in chosen)


def tone_of(found: ModelJudgement) -> str:
    """Return the colour of a sentence by its meaning: good or bad only for a clear difference without doubt."""
    test, p = found.gain, found.gain_p
    if test is None or p is None or p >= _CLEARLY or any(check.level in ("fault", "warning") for check in found.checks):
        return "neutral"
    return "held" if test.only_first > test.only_second else ""


def _against_none(found: ModelJudgement) -> str:
    test, p = found.gain, found.gain_p
    if test is None or p is None:
        return ""
    base = test.both + test.only_second
    clear = p < _CLEARLY
    if test.only_first == test.only_second == 0:
        how = "as many as without it"
    elif not clear:
        how = f"no clear difference to the {base} without it (p = {p:.2g})"
    else:
        more = "more" if test.only_first > test.only_second else "fewer"
        how = f"{more} than the {base} without it (p = {p:.2g})"
    return f" That is {how}."


def _named(found: ModelJudgement) -> str:
    known = [about.title for _, about in abouts_of(found)]
    return f"{found.spec} ({', '.join(known)}; our re-implementation)" if known else found.spec


def abouts_of(found: ModelJudgement) -> list[tuple[str, About]]:
    """Return what is known of a model's defences, with the name of each."""
    names = [written.partition(":")[0] for written in found.facts.defences]
    return [(name, DEFENCES[name].about) for name in names if name in DEFENCES]


def claim_words(claim: Claim) -> str:
    """Return a published figure with its setting.

    Example:
        >>> claim_words(Claim("ViT-L/14", "ImageNet", "PGD-100", 4, 40.0, clean=60.0))
        '40 % (clean 60 %): ViT-L/14, ImageNet, PGD-100, Linf 4/255, unaware of the defence'
    """
    clean = "" if claim.clean is None else f" (clean {claim.clean:g} %)"
    radius = "radius not read" if claim.eps is None else f"{claim.norm} {claim.eps:g}/255"
    how = "through the defence" if claim.adaptive else "unaware of the defence"
    return f"{claim.robust:g} %{clean}: {claim.model}, {claim.data}, {claim.attack}, {radius}, {how}"


def act_words(name: str) -> str:
    """Return what an act of a judgement is.

    Example:
        >>> act_words("mode:identity")
        'PGD and APGD, what the defence adds taken as a constant (BPDA)'
    """
    if name in UNAWARE:
        return f"points of {UNAWARE[name]} on the undefended model"
    if name == LABEL:
        return "points of PGD on the undefended model, its own prediction in the label's place"
    if name == FEATURE:
        return "PGD that drives the feature away from the clean one"
    if name == SQUARE:
        return "Square, which sees no gradient"
    kind, _, mode = name.partition(":")
    words = "the model's own gradient" if mode == OWN else MODES.get(mode, mode)
    attack = {
        MODE: "PGD and APGD",
        SHORT: "PGD of a quarter of the steps",
        START: "PGD from the transferred points",
        TARGETED: "APGD towards the likeliest wrong classes",
    }
    return f"{attack[f'{kind}:']}, {words}"


# Blocks


def defended_models(summary: Judgement) -> list[ModelJudgement]:
    """Return what was judged, without what it stands on."""
    return [found for found in summary.models if found.facts.base is not None]


def effort_of(summary: Judgement) -> str:
    """Return how hard every attack tried: steps, wrong classes that APGD is aimed at, queries."""
    if summary.targets is None:  # of a version before
        return f"{summary.steps} gradient steps and {summary.queries} queries of Square"
    wrong = count_of(summary.targets, "wrong classes")
    aimed = f"APGD towards up to {wrong}" if summary.targets else "no APGD towards wrong classes"
    return f"{summary.steps} gradient steps, {aimed} and {summary.queries} queries of Square"


def figures_of(found: ModelJudgement) -> list[Rate]:
    """Return the figures of `COLUMNS`."""
    return [found.clean, *found.unaware.values(), found.own_label, found.adaptive, found.worst]


def ordered_models(summary: Judgement) -> list[ModelJudgement]:
    """Return the undefended models, each before what stands on it, those by robust accuracy."""
    bases = [found for found in summary.models if found.facts.base is None]
    return [
        one
        for base in bases
        for one in (
            base,
            *sorted(
                (found for found in defended_models(summary) if found.facts.base == base.spec),
                key=lambda found: -found.worst.successes,
            ),
        )
    ]


def left_aside(summary: Judgement) -> str:
    """Say how many images are in no figure, and why; "" for none."""
    parts = [
        f"{count_of(number, 'images')} {why}"
        for number, why in ((summary.unreadable, "unreadable"), (summary.unknown, "of no known class"))
        if number
    ]
    return f"Left out of every figure: {', '.join(parts)}." if parts else ""


def _table(summary: Judgement) -> Iterator[doc.Block]:
    rows: list[doc.Row] = []
    strong = set()
    for found in ordered_models(summary):
        if found.facts.base is None:
            strong.add(len(rows))
        rows.append(
            (
                doc.Code(found.spec),
                *(doc.Measure.of(figure) for figure in figures_of(found)),
                "" if found.gain_p is None else f"{found.gain_p:.2g}",
                f"{found.facts.forward:g} / {found.facts.backward:g}",
                cost_of(found, summary),
                str(sum(check.level in ("warning", "fault") for check in found.checks) or ""),
            )
        )
    columns = [doc.Column("Model"), *doc.numbers(*COLUMNS, "p", "passes F / B", "cost x", "warnings")]
    about = ball(summary.norm, summary.eps_text)
    title = f"{about}; {count_of(summary.images, 'images')}, {count_of(summary.steps, 'steps')}"
    yield doc.Table(columns, rows, title=title, strong=frozenset(strong))
    if aside := left_aside(summary):
        yield doc.Text(aside)
    yield doc.Text(
        f"Attacks: {effort_of(summary)}. "
        "Unaware: points made on the undefended model, as most papers attack. Own label: the same, with that model's "
        "own prediction in the label's place, so that they carry no label. Adaptive: right when clean, at those "
        "points, under every gradient mode and under the attack on features. Worst: under Square too; only this is "
        "robust accuracy.",
        kind="small",
    )
    if summary.not_reproduced:
        rows = [
            (doc.Code(row.spec), row.title, row.reference, row.claimed, row.reason) for row in summary.not_reproduced
        ]
        heads = ("Not reproduced", "Method", "Reference", "Claimed", "Why")
        yield doc.Table([doc.Column(head) for head in heads], rows)
    every = [(found.spec, about) for found in defended_models(summary) for _, about in abouts_of(found)]
    claims = [(spec, claim) for spec, about in every for claim in about.claims]
    if claims:
        listed: list[doc.Row] = [(doc.Code(spec), claim_words(claim)) for spec, claim in claims]
        head = "Published by its authors, or by those named, as a rule on other models and images"
        columns = [doc.Column("Defence"), doc.Column(head)]
        yield doc.Table(columns, listed)


def _section(found: ModelJudgement, summary: Judgement) -> doc.Section:
    blocks: list[doc.Block] = [doc.Facts(list(_facts(found, summary)), kind="sentences")]
    blocks.append(doc.Chart(partial(three_bars, found, summary), caption=_caption(found)))
    every = all(act.alone is not None for act in found.acts)
    acts: list[doc.Row] = [_act_row(act, every=every) for act in found.acts]
    alone = ("fooled by it alone",) if every else ()
    columns = [doc.Column("Attack"), *doc.numbers("images", "right", *alone, "passes F", "passes B")]
    blocks.append(doc.Table(columns, acts, title=f"{found.spec}: attacks", only="page"))
    seen = [check for check in found.checks if check.level != "ok"]
    if seen:
        blocks.append(doc.Text([doc.Code(found.spec)], only="terminal"))
    blocks.append(doc.Checks(findings(seen), none="Nothing that would make these figures doubtful was found."))
    short = found.spec if found.facts.base is None else "+".join(found.facts.defences) or found.spec
    key = "model-" + "".join(c if c.isalnum() else "-" for c in found.spec)
    return doc.Section(plain(found.spec), blocks, key=key, short=plain(short, 24))


def _facts(found: ModelJudgement, summary: Judgement) -> Iterator[tuple[str, doc.Line]]:
    facts = found.facts
    for name, about in abouts_of(found):
        yield about.title, f"{about.reference}; {about.summary}"
        yield "Fidelity", fidelity_words(about)
        for claim in about.claims:
            yield "Claimed", claim_words(claim)
        for said in about.differs:
            yield f"Differs ({name})", said
    if facts.base is not None:
        yield "Gradient modes tried", "; ".join(f"{mode} ({MODES.get(mode, 'its own')})" for mode in facts.modes)
    for name, said in _assumed(found):
        yield f"Assumed here ({name})", said
    if gate := reproduction(found, summary):
        yield "Reproduction", gate
    passes = f"{facts.forward:g} forward and {facts.backward:g} backward passes, counted at the encoder"
    yield "Cost of a clean answer", passes
    if facts.random:
        yield "Random", f"gradients averaged over {facts.eot} draws or more, {facts.draws} fresh ones judge by majority"


def fidelity_words(about: About) -> str:
    """Return how near a version is to the published one."""
    words = {
        "code": "our re-implementation; the authors' code was read",
        "text": "our re-implementation from the text",
        DESCRIPTION: "our re-implementation after a description by others",
    }
    read = f" ({about.commit})" if about.commit else ""
    return words.get(about.fidelity, "a common method, our implementation") + read


def _act_row(act: Act, *, every: bool) -> doc.Row:
    where = " (on what was left)" if act.left_only else ""
    alone = (f"{act.alone:,}",) if every else ()
    passes = f"{act.forward:,}", f"{act.backward:,}"
    return (f"{act_words(act.name)}{where}", f"{act.tried:,}", f"{act.right:,}", *alone, *passes)


def _caption(found: ModelJudgement) -> str:
    if found.facts.base is None:
        return "The undefended model: its own gradients, and the worst case over all attacks."
    if _is_bundled(found):
        return "The bundled model's figures say nothing about CLIP, so that no claimed figure stands beside them."
    return "A claimed figure is of other images, and as a rule of another model; its setting stands above."


def _is_bundled(found: ModelJudgement) -> bool:
    return split_spec(found.spec)[0] in _BUNDLED


def _is_shown(claim: Claim, summary: Judgement) -> bool:
    """Whether a claim may stand as a bar beside "unaware": of the run's ball, and made without sight of the defence."""
    eps = None if claim.eps is None else claim.eps / 255
    return not claim.adaptive and claim.norm == summary.norm and eps is not None and abs(eps - summary.eps) < 1e-9


def bars_of(found: ModelJudgement, summary: Judgement) -> list[tuple[str, float, float, float]]:
    """Return the bars of a model's picture: name, per cent, and both ends of the interval (none for a claim).

    Three: claimed (where there is a claim of this ball and the model is not a bundled one, else adaptive), unaware,
    worst.
    """

    def of(name: str, figure: Rate) -> tuple[str, float, float, float]:
        return name, 100 * (figure.value or 0.0), 100 * figure.low, 100 * figure.high

    unaware, worst = of("unaware", found.unaware[next(iter(UNAWARE))]), of("worst", found.worst)
    claims = [claim for _, about in abouts_of(found) for claim in about.claims]
    fitting = [claim for claim in claims if _is_shown(claim, summary)]
    if fitting and not _is_bundled(found):
        claim = fitting[0]
        return [(f"claimed ({claim.model}, {claim.data})", claim.robust, claim.robust, claim.robust), unaware, worst]
    return [unaware, of("adaptive", found.adaptive), worst]


@chart
def three_bars(found: ModelJudgement, summary: Judgement) -> Markup:
    """Return the picture of a model: three bars with their intervals, and the accuracy without an attack as a line."""
    bars = bars_of(found, summary)
    figure, axes = new_figure((4.8, 1.7))
    colours = {"unaware": SERIES[0], "adaptive": SERIES[1], "worst": BAD}
    for place, (name, value, low, high) in enumerate(bars):
        claimed = name not in colours
        axes.barh(
            -place,
            value,
            height=0.62,
            color="none" if claimed else colours[name],
            edgecolor=MUTED if claimed else "none",
            hatch="///" if claimed else None,
        )
        axes.plot([low, high], [-place, -place], color=INK, linewidth=1.2)
        axes.text(min(value, 96) + 1.5, -place + 0.16, f"{value:.1f} %", va="bottom", color=INK, fontsize=9)
    axes.axvline(100 * (found.clean.value or 0.0), color=MUTED, linewidth=1, linestyle="--")
    axes.set_yticks([-place for place in range(len(bars))], [name for name, *_ in bars])
    axes.set_xlim(0, 108)
    axes.set_xlabel("right, per cent (dashed: without an attack)")
    axes.grid(axis="y", color=GRID, linewidth=0)
    said = ", ".join(f"{name} {value:.1f} per cent" for name, value, *_ in bars)
    key = "bars-" + "".join(c if c.isalnum() else "-" for c in found.spec)
    return as_svg(figure, key=key, alt=f"{found.spec}: {said}")

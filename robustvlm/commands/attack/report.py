"""What is said of an attack run, once for the terminal and the page."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from robustvlm.attacks.goals import CLEAN
from robustvlm.commands.attack import plots, record
from robustvlm.commands.attack.record import AttackedRun, load_run
from robustvlm.commands.attack.summary import EpsSummary, GroupSummary, Summary
from robustvlm.report import page, repeat, screen
from robustvlm.report import sections as doc
from robustvlm.report.words import DASH, bounds, cost_rows, count_of, findings, norm_name, plain, sentence
from robustvlm.stats import Rate

# Rows of the terminal's tables of classes and superclasses; the page has them all.
_WORST = {"class": 5, "superclass": 12}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished attack run, by default to `report.html` in its folder, and return its path."""
    return page.write_report_of(folder, out, lambda run: report_of(load_run(run)))


def show(run: AttackedRun, console: Console) -> None:
    """Print what came of a run, and where its report and its rows are."""
    places = {"Report": run.report, "Results": run.folder / "results.parquet"}
    screen.show(console, attack_report(run, drawn=False), doc.Closing(places))


def report_of(run: AttackedRun) -> doc.Report:
    """Return all that is said of a run, drawn parts included."""
    return attack_report(run)


def attack_report(run: AttackedRun, *, drawn: bool = True) -> doc.Report:
    """Return what is said of a run; without what is `drawn`, which only a page has and which takes its time."""
    summary, at, words = run.summary, record.headline(run.summary), record.words_of(run.summary)
    config = run.manifest["config"]
    about: list[doc.Inline] = [
        f", {count_of(summary.clean_accuracy.total, 'images')}, {plain(', '.join(config['attack']))}"
    ]
    early = bool(summary.unfinished)
    lines = [record.verdict(summary), record.smaller_eps(summary)]
    if at is not None:
        lines.append(record.cosines(at, summary.goal, unfinished=early))
        lines.append(record.acceptances(at, unfinished=early, abstains=summary.abstains))
    parts = [_strength(run, at, words, drawn=drawn)]
    if at is not None:
        parts += [*([] if summary.images.uncounted else _levels(summary, at)), *_classes(summary, at, words)]
    if drawn:
        refused = "no answer" if summary.abstains else "rejected"
        parts += _gallery(page.load_gallery(run.folder / "gallery", run.class_names, run.eps_texts, refused=refused))
    cost: Sequence[tuple[str, doc.Line]] = cost_rows(summary.cost, summary.estimate)
    parts += [
        _checks(summary),
        doc.Section("Cost", [doc.Facts(cost, only="both")], key="cost", short="Cost"),
    ]
    plain_goal = summary.goal == "misclassify" and not summary.can_reject
    report = doc.Report(
        kind="attack report",
        name=run.name,
        kicker="Attack report" + ("" if plain_goal else f" · goal: {words.title}"),
        facts=doc.facts_line(run.manifest, *about, f" in {norm_name(summary.norm)}"),
        verdicts=[doc.Verdict([line for line in lines if line], _tone(summary, at))],
        sections=parts,
        cards=_cards(summary, at, words),
        footer=doc.ungrouped_footer(run.manifest, summary.checks, summary.images.worth),
    )
    return repeat.repeatable(report, run.manifest, drawn=run.summary.drawn)


def _tone(summary: Summary, at: EpsSummary | None) -> str:
    """Return the colour of the verdict by its meaning: good only where a sound, whole run fooled no image."""
    if summary.unfinished or at is None or not at.attack_success_rate.total:
        return "neutral"
    if at.attack_success_rate.successes:
        return ""
    sound = not at.undecided and all(check.level not in ("fault", "warning") for check in summary.checks)
    return "held" if sound else "neutral"


def _cards(summary: Summary, at: EpsSummary | None, words: record.GoalWords) -> list[doc.Card]:
    cards = []
    open_ended = record.open_ended(summary, summary.clean_accuracy, summary.clean_accuracy_at_most)
    if not open_ended and not summary.images.uncounted:
        if words.clean == CLEAN:
            whole = "images right before any attack"
        else:
            refused = "images without an answer" if summary.abstains else "images rejected"
            whole = f"{refused} before any attack" if summary.says_classes else "images, before any attack"
        cards.append(doc.Card(sentence(words.clean), summary.clean_accuracy, whole, good=True))
    if at is not None and not summary.unfinished:
        eps = plain(at.eps_text, 20)
        whole = "images right after every attack" if words.accuracy else "images, before and after every attack"
        cards += [
            doc.Card(f"{sentence(words.held)} at {eps}", at.robust_accuracy, whole, good=True),
            doc.Card(f"Attack success rate at {eps}", at.attack_success_rate, words.whom),
        ]
    return cards


# The strength of the attack: by radius, by attack, and how success came about


def _strength(run: AttackedRun, at: EpsSummary | None, words: record.GoalWords, *, drawn: bool) -> doc.Section:
    summary = run.summary
    table = _by_eps(summary, words)
    if at is None:
        return doc.Section("Strength of the attack", [table], key="curve")
    lead = (
        f"Worst case per image over {record.how_many_attacks(len(at.per_attack))}: an image counts as robust only if "
        f"nothing fooled it, at this size or a smaller one. Stronger attacks may exist, so {words.held} is an upper "
        "bound."
    )
    curve = (
        [_curve(run, words)]
        if drawn and len(summary.per_eps) > 1 and summary.images.evaluated and not summary.images.uncounted
        else []
    )
    blocks: list[doc.Block] = [doc.Text(lead, "lead"), doc.Pair([*curve, table]), _by_attack(summary, words)]
    if drawn and summary.images.evaluated:
        blocks.append(doc.Pair(_histograms(run, at, words)))
    return doc.Section("Strength of the attack", blocks, key="curve", short="Strength of the attack")


def _by_eps(summary: Summary, words: record.GoalWords) -> doc.Table:
    undecided = any(at.undecided for at in summary.per_eps)
    norm = norm_name(summary.norm)
    clean = share(summary, summary.clean_accuracy, summary.clean_accuracy_at_most)
    rows: list[doc.Row] = [("clean", clean, DASH, DASH)]
    if summary.per_eps:
        rows = [
            (plain(at.eps_text, 20), clean, *_worst_case(summary, at), *([f"{at.undecided:,}"] if undecided else []))
            for at in summary.per_eps
        ]
    about = "" if words.accuracy else f": {words.title}"
    titles = (f"ε ({norm})", sentence(words.clean), sentence(words.held), "Attack success rate")
    return doc.Table(
        [*map(doc.Column, titles), *(doc.numbers("Undecided") if undecided else [])],
        rows,
        title=f"Worst case over the attacks ({norm}, {count_of(summary.clean_accuracy.total, 'images')}){about}",
        caption=words.caption,
    )


def _worst_case(summary: Summary, at: EpsSummary) -> tuple[doc.Measure, doc.Measure]:
    """Return robust accuracy and success rate; as bounds where a run has not come to some of the images."""
    if summary.images.uncounted:
        return doc.Measure(DASH), doc.Measure(DASH)
    if summary.unfinished and at.undecided:
        return doc.Measure(record.robust_bounds(at)), doc.Measure(record.success_bounds(at))
    return doc.Measure.of(at.robust_accuracy), doc.Measure.of(at.attack_success_rate)


def share(summary: Summary, least: Rate, most: Rate | None) -> doc.Measure:
    """Return a rate with its interval; as bounds where a run that stopped early does not know it yet, or nothing."""
    if summary.images.uncounted:
        return doc.Measure(DASH)
    return doc.Measure(bounds(least, most)) if record.open_ended(summary, least, most) else doc.Measure.of(least)


def _by_attack(summary: Summary, words: record.GoalWords) -> doc.Table:
    broke = any(attack.failed for at in summary.per_eps for attack in at.per_attack)
    rows: list[doc.Row] = []
    for at in summary.per_eps:
        if len(summary.per_eps) > 1:
            rows.append(f"ε = {plain(at.eps_text, 20)}")
        for attack in at.per_attack:
            left = share(summary, attack.robust_accuracy_after, attack.robust_accuracy_after_at_most)
            counts = (attack.attacked, attack.fooled, *([attack.failed] if broke else []), attack.steps, attack.passes)
            rows.append((plain(attack.attack, 60), left, *(f"{count:,}" for count in counts)))
    goal = record.first_goal(summary)
    titles = ("Ran on", "Fooled", *(["Broke off"] if broke else []), "Gradient steps", "Passes")
    return doc.Table(
        [
            doc.Column("Attack"),
            doc.Column("Accuracy left" if words.accuracy else sentence(words.held)),
            *doc.numbers(*titles),
        ],
        rows,
        title=f"By attack, each on {record.each_attack_on(words)}{f' ({goal})' if goal else ''}",
        caption="Passes are those of an attack's images; what else was paid is under cost.",
    )


def _curve(run: AttackedRun, words: record.GoalWords) -> doc.Chart:
    what = "Share of all images still classified right."
    if not words.accuracy:
        what = f"{sentence(words.held)}: share of all images, without an attack (0) as under it."
    band = "The band is the 95% interval."
    if run.summary.unfinished:
        band = (
            "The run stopped early: the band goes from what is sure to what is still possible, with the 95% intervals "
            "of both."
        )
    curve = [plots.curve_of(run.summary, "this run")]
    draw = partial(plots.security_curve, curve, key="curve", norm=norm_name(run.summary.norm))
    return doc.Chart(draw, caption=f"{what} {band}")


def _histograms(run: AttackedRun, at: EpsSummary, words: record.GoalWords) -> list[doc.Block]:
    """Return the charts of margins and steps, where there is data for them."""
    charts: list[doc.Block] = []
    margins = plots.margins(run.rows, at.eps)
    if margins.clean:
        decided = " that were decided" if run.summary.unfinished else ""
        early = " An attack stops as soon as it succeeds, so margins pile up just below zero." if words.leave else ""
        charts.append(
            doc.Chart(
                partial(plots.margin_histogram, margins, accuracy=words.accuracy, key="margins"),
                title="How close to the boundary",
                caption=f"Over the {words.whom}{decided}, at ε = {plain(at.eps_text, 20)}.{early}",
            )
        )
    steps = plots.steps_to_success(run.rows)
    if steps and words.leave:
        names = {eps: plain(text, 20) for eps, text in run.eps_texts.items()}
        charts.append(
            doc.Chart(
                partial(plots.steps_histogram, steps, names, key="steps"),
                title="How quickly it succeeds",
                caption="Gradient steps taken by each successful attack. Many successes near the step limit mean that "
                "more steps would find more.",
            )
        )
    return charts


# Where it strikes: levels of the class tree, classes, single images


def _levels(summary: Summary, at: EpsSummary) -> list[doc.Section]:
    eps = plain(at.eps_text, 20)
    lead: doc.Line
    if at.transfer is not None:
        lead = (
            "Attacks against the level of the row, scored at the level of the column: share of all images whose "
            "predicted class lies in the right superclass at every point that the attacks recorded. No image leaves "
            "early. Attacks against all levels at once climb the sum over them, so that at the coarsest level those "
            "against it alone may find more."
        )
        columns = [doc.Column("Attacked"), *(doc.Column(plain(name, 60)) for name in at.transfer.levels)]
        rows: list[doc.Row] = [("nothing", *map(doc.Measure.of, at.transfer.clean_accuracy))]
        for row in at.transfer.rows:
            most = row.robust_accuracy_at_most or row.robust_accuracy
            cells = (share(summary, *pair) for pair in zip(row.robust_accuracy, most, strict=True))
            rows.append((plain(row.name, 60), *cells))
        title = f"Accuracy left at each level at ε = {eps}, by the level attacked"
    elif at.levels:
        lead = [
            "Right at a level: the predicted class lies in the right superclass, unperturbed and at every point that "
            "these attacks recorded. Attacks against a level itself find more (",
            doc.Code("--goal superclass:LEVEL"),
            ").",
        ]
        columns = [doc.Column("Level"), doc.Column("Clean accuracy"), doc.Column("Accuracy under these attacks")]
        rows = [
            (
                plain(level.name, 60),
                doc.Measure.of(level.clean_accuracy),
                share(summary, level.robust_accuracy, level.robust_accuracy_at_most),
            )
            for level in at.levels
        ]
        title = f"By level of the class tree at ε = {eps}"
    else:
        return []
    blocks: list[doc.Block] = [doc.Text(lead, "lead"), doc.Table(columns, rows, title=title)]
    return [doc.Section("Levels of the class tree", blocks, key="levels", short="Levels")]


def _classes(summary: Summary, at: EpsSummary, words: record.GoalWords) -> list[doc.Section]:
    """Return what is known of classes; nothing of a run that stopped early: what it decided are those easily fooled."""
    every = [] if summary.unfinished else plots.group_rows(summary)
    if not every:
        return []
    eps = plain(at.eps_text, 20)
    classes, superclasses = plots.ranking(at.per_class), plots.ranking(at.per_superclass, ends=30)
    blocks: list[doc.Block] = [
        doc.Text(
            f"Attack success rate at ε = {eps}, over each class's {words.whom}. A class with few images has a wide "
            "interval: look at the whisker before the bar.",
            "lead",
        )
    ]
    if superclasses.total:
        bars = [*superclasses.worst, *superclasses.best]
        blocks.append(doc.Bars(bars, "Attack success rate per superclass", title="Superclasses"))
    if classes.total:
        never = f"{classes.always} of {classes.total} classes were fooled every time, {classes.never} never."
        blocks.append(doc.Text(never, "lead"))
    if classes.best:
        worst = doc.Bars(classes.worst, "Classes most often fooled", title="Most often fooled", half=True)
        best = doc.Bars(classes.best[::-1], "Classes least often fooled", title="Least often fooled", half=True)
        blocks.append(doc.Pair([worst, best]))
    elif classes.worst:
        blocks.append(doc.Bars(classes.worst, "Attack success rate per class", title="Classes"))
    titles = [doc.Column(f"Success at {plain(point.eps_text, 20)}") for point in summary.per_eps]
    table = doc.Table(
        [doc.Column("Class"), *doc.numbers("Images", sentence(words.before)), *titles],
        [
            (doc.Name(row.name), f"{row.images:,}", f"{row.clean_correct:,}", *map(doc.Measure.of, row.rates))
            for row in every
        ],
    )
    which = " at every ε" if len(summary.per_eps) > 1 else ""
    blocks += [
        doc.More(f"All {len(every)} classes{which}", [table]),
        *_worst("superclass", at.per_superclass, eps, words),
        *_worst("class", at.per_class, eps, words),
    ]
    return [doc.Section("Which classes fall", blocks, key="classes", short="Classes")]


def _worst(kind: str, groups: Sequence[GroupSummary], eps: str, words: record.GoalWords) -> list[doc.Block]:
    """Return the groups most often fooled, for the terminal, which has no room for all."""
    order = plots.ranked(groups)
    if not order:
        return []
    some = order[: _WORST[kind]]
    count = f"{len(some)} of {len(order)}, " if len(some) < len(order) else ""
    rows: list[doc.Row] = [
        (
            doc.Name(group.name, 40),
            doc.Measure.of(group.attack_success_rate),
            f"{group.clean_correct:,} of {group.images:,}",
        )
        for group in some
    ]
    columns = [doc.Column(sentence(kind)), doc.Column("Attack success rate"), *doc.numbers(sentence(words.before))]
    title = f"By {kind} at ε = {eps} ({count}most often fooled first)"
    return [doc.Table(columns, rows, title=title, only="terminal")]


def _gallery(examples: Sequence[page.Example]) -> list[doc.Section]:
    if not examples:
        return []
    lead = (
        "The first images that were fooled, in the order of the data. The difference is amplified by the factor given, "
        "grey meaning no change. Pictures are shown with 8 bits per colour; the attack was judged on exact values."
    )
    pictures = doc.Pictures([_picture(example) for example in examples])
    return [doc.Section("Adversarial examples", [doc.Text(lead, "lead"), pictures], key="gallery", short="Examples")]


def _picture(x: page.Example) -> doc.Picture:
    if x.clean_words is not None and x.words is not None:  # a model that answers in words
        before, after, said = x.clean_words, x.words, "of which the model says:"
        below = (f"clean: {before}", f"adversarial: {after}")
        told = ("", "")
    else:
        before, after, said = x.clean_prediction, x.prediction, "classified"
        below = (f"clean {x.clean_confidence}", f"adversarial {x.confidence}")
        told = (f" with confidence {x.clean_confidence}", f" with confidence {x.confidence}")
    before, after = plain(before, 60), plain(after, 60)
    return doc.Picture(
        [
            (x.clean, f"Clean image, {said} {before}{told[0]}", below[0]),
            (x.adversarial, f"Adversarial image, {said} {after}{told[1]}", below[1]),
            (
                x.difference,
                f"Their difference, amplified {x.gain} times",
                f"difference \N{MULTIPLICATION SIGN} {x.gain}",
            ),
        ],
        ["True class ", doc.Name(x.label, 60), f"; {x.attack}, ε = {plain(x.eps, 20)}; image ", doc.Code(x.image_id)],
        title=[doc.Name(before), " → ", doc.Name(after)],
    )


def _checks(summary: Summary) -> doc.Section:
    found = findings(summary.checks)
    lead = "What was asked of the model and the attack themselves, so that a broken setup does not pass for robustness."
    blocks: list[doc.Block] = [doc.Text(lead, "lead")] if found else []
    blocks.append(doc.Checks(found, none="No check was recorded for this run."))
    blocks += doc.left_out(
        [(image.id, image.reason) for image in summary.unreadable], "unreadable, left out of every number"
    )
    return doc.Section("Checks of this evaluation", blocks, key="checks", short="Checks")

"""The HTML report of an immunize run, and what an immunised model does in plain words."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from robustvlm.commands.immunize.record import NAME, Added, ImmunizeSummary, Measures
from robustvlm.errors import UserError
from robustvlm.report import sections as doc
from robustvlm.report.charts import loss_curves
from robustvlm.report.repeat import repeatable
from robustvlm.report.words import interval, percent, plain
from robustvlm.runs.run import FinishedRun
from robustvlm.stats import Rate

# What an immunised model does, in plain words: terminal and report say the same things with these


def verdict(measures: Measures) -> str:
    """Say which share of unknown images the model rejects, and of known ones, at the thresholds it is deployed with."""
    if measures.rejected is None:
        return "Made from texts alone: how many images of either kind it rejects has not been measured."
    unknown = [f"{_rate(found.share_rejected)} of {plain(spec, 60)}" for spec, found in measures.unknown.items()]
    if unknown:
        first = f"Of unknown images the model rejects, at its own thresholds, {'; '.join(unknown)}."
    else:
        first = "How many unknown images the model rejects has not been measured: pass --ood DATA."
    return (
        f"{first} Of the known ones it wrongly refuses {_rate(measures.rejected)}: held-out images, which "
        "set the thresholds too, so expect more elsewhere."
    )


def tone(measures: Measures, notes: Sequence[str]) -> Literal["held", "", "neutral"]:
    """Return the colour class of the verdict: "held" (green), "" (red) or "neutral".

    Red: less than half of the unknown images of some set are rejected. Green: at least nine tenths of every set are, by
    the lower end of the interval, and no more than a tenth of the known ones refused. Without unknown images neither.
    """
    refused = measures.rejected
    if refused is None or not measures.unknown:
        return "neutral"
    rates = [found.share_rejected for found in measures.unknown.values()]
    if any(rate.value is None or rate.value < 0.5 for rate in rates):
        return ""
    oracle = any(note.startswith("Oracle") for note in notes)
    good = all(rate.low >= 0.9 for rate in rates) and refused.value is not None and refused.value <= 0.1
    return "held" if good and not oracle else "neutral"


def _rate(found: Rate) -> str:
    if found.value is None:
        return "none"
    return f"{percent(found.value)} ({interval(found)})"


# The HTML report of an immunize run: one file that needs no network and no script

# More would be a file, not a report; all of them are in the record.
_ROWS = 400
_CLASSES = 100
_KNOWN = (
    ("Accuracy before (zero-shot)", "accuracy_before", True),
    ("Accuracy after", "accuracy_after", True),
    ("Right and accepted", "accepted_right", True),
    ("Known images wrongly refused", "rejected", False),
)
_AUROC = (
    "AUROC against the held-out known images, with 95% intervals: of the largest softmax probability before (MSP), and "
    "of the score less its threshold after. Rejected: at the thresholds of this model."
)
_COLUMNS = (
    "alpha: weight of the text in the prototype (1: text alone). kappa: concentration of the images. Thresholds are "
    "marked as pooled where a class has too few held-out images for a fit of its own; KS is the distance of its lowest "
    "scores from their Weibull fit."
)
_MARGIN = "Margin: 1 - cosine of the prototype and the nearest antibody."


def immunize_report(run: FinishedRun[ImmunizeSummary]) -> doc.Report:
    """Return all that is said of an immunised model.

    Raises:
        UserError: the record is not one of this program's.
    """
    record, antibodies = run.summary.model_dump(), doc.Code(run.manifest["config"]["antibodies"], limit=60)
    try:
        measures = run.summary.measures
        parts = [*_added(run.summary.added), _made(record), *_measures(measures), _classes(record), _kept(record)]
        verdicts = [doc.Verdict([verdict(measures)], tone=tone(measures, run.summary.notes))]
        if record["notes"]:
            verdicts.append(doc.Verdict([plain(note, 400) for note in record["notes"]]))
        report = doc.Report(
            kind="immunised model",
            name=run.name,
            kicker="Immunised model",
            facts=doc.facts_line(run.manifest, ", antibodies from ", antibodies),
            verdicts=verdicts,
            cards=_cards(measures),
            sections=parts,
        )
        return repeatable(report, run.manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{run.folder / NAME}' is no record of `robustvlm immunize` ({error})") from None


def immunize_closing(run: FinishedRun[ImmunizeSummary]) -> doc.Closing:
    """Return where the model and its report are."""
    return doc.Closing({"Model": run.folder, "Report": run.report})


def _added(added: Added | None) -> list[doc.Section]:
    """Return what a class that was added did to the others."""
    if added is None:
        return []
    others = added.others
    said = (
        f". Of {others.total} held-out images of the other classes, {others.only_first} were right before and "
        f"are wrong now, {others.only_second} the other way round (paired test, p = {others.p_value:.3g})."
    )
    line: list[doc.Inline] = [doc.Name(added.name), " was added to ", doc.Code(added.to), said]
    return [doc.Section("The class that was added", [doc.Text(line)])]


def _made(record: dict[str, Any]) -> doc.Section:
    blocks: list[doc.Block] = [doc.Facts(_diagnostics(record), kind="sentences", only="both")]
    vaccine = record.get("vaccine")
    if vaccine is not None and len(vaccine["history"]) >= 2:
        names = {"pull (held out)": "pull", "push (held out)": "push", "held out, both": "held_out"}
        points = {name: [(look["step"], look[key]) for look in vaccine["history"]] for name, key in names.items()}
        caption = "The step with the smallest loss that costs no accuracy is kept; step 0 is the model as it was."
        title = "The vaccine's losses on held-out images"
        blocks.append(doc.Chart(partial(loss_curves, points, key="vaccine"), title, caption))
    return doc.Section("How it was made", blocks, key="facts", short="Facts")


def _measures(measures: Measures) -> list[doc.Section]:
    """Return what was measured on known images, on the page in cards, and on every set of unknown ones."""
    if measures.accuracy_after is None:
        return []
    before, after = (doc.Measure.of(found) for found in (measures.accuracy_before, measures.accuracy_after))
    rows: list[doc.Row] = [("accuracy", before, after)]
    later = (("right and accepted", measures.accepted_right), ("wrongly refused", measures.rejected))
    rows += [(what, "", doc.Measure.of(found)) for what, found in later if found is not None]
    columns = [doc.Column("Measure"), doc.Column("Before"), doc.Column("After")]
    known: list[doc.Block] = [doc.Table(columns, rows, title="Known images, held out", only="terminal")]
    if not measures.unknown:
        return [doc.Section("", known)]
    columns = [
        doc.Column("Data"),
        *doc.numbers("Images"),
        *map(doc.Column, ("AUROC before", "AUROC after", "Rejected")),
    ]
    sets: list[doc.Row] = [
        (
            doc.Name(spec),
            f"{found.images:,}",
            *(doc.Measure.between(auroc.value, auroc.low, auroc.high) for auroc in (found.auroc_msp, found.auroc)),
            doc.Measure.of(found.share_rejected),
        )
        for spec, found in measures.unknown.items()
    ]
    blocks = [*known, doc.Text(_AUROC, kind="lead"), doc.Table(columns, sets)]
    return [doc.Section("Unknown images", blocks, key="unknown", short="Unknown images")]


def _classes(record: dict[str, Any]) -> doc.Section:
    """Return the table of the classes; of many those with the smallest margin, which are the likeliest to be confused.

    Of a model without images there is nothing to say of images, prototypes and thresholds.
    """
    classes = shown = record["classes"]
    taught = any(row["images"] for row in classes)
    said = [_COLUMNS, _MARGIN] if taught else [_MARGIN]
    if len(classes) > _CLASSES:
        shown = sorted(classes, key=lambda row: row["margin"])[:_CLASSES]
        said.append(f"The {len(shown)} of {len(classes):,} with the smallest margin; all are in immunity.json.")
    titles = ("Images", "alpha", "kappa", "Antibodies", "Margin", "Threshold", "KS")
    cells = _cells if taught else _cells_of_texts
    columns = doc.numbers(*(titles if taught else ("Antibodies", "Margin")))
    table = doc.Table([doc.Column("Class"), *columns], [cells(row) for row in shown], only="page")
    return doc.Section("Classes", [doc.Text(" ".join(said), kind="lead"), table], key="classes", short="Classes")


def _cells(row: dict[str, Any]) -> doc.Row:
    return (
        doc.Name(row["name"], limit=60),
        f"{row['images']:,}",
        " ".join(f"{value:.2f}" for value in row["alpha"]),
        f"{row['kappa']:.0f}",
        f"{row['antibodies']:,}",
        f"{row['margin']:.3f}",
        [f"{row['threshold']:.3f}", doc.Small(" pooled" if row["pooled"] else "")],
        f"{row['fit']['distance']:.3f}" if row["fit"] else "",
    )


def _cells_of_texts(row: dict[str, Any]) -> doc.Row:
    return doc.Name(row["name"], limit=60), f"{row['antibodies']:,}", f"{row['margin']:.3f}"


def _kept(record: dict[str, Any]) -> doc.Section:
    kept, dropped = (record["antibodies"][key] for key in ("kept", "dropped"))

    def table(rows: list[tuple[str, str, str]], last: str, limit: int) -> doc.Table:
        cells = [
            (doc.Name(text, 120), doc.Name(of_class, 60), plain(why, limit)) for text, of_class, why in rows[:_ROWS]
        ]
        return doc.Table([doc.Column("Text"), doc.Column("Class"), doc.Column(last)], cells)

    blocks: list[doc.Block] = [
        doc.Text(f"{len(kept):,} antibodies kept, {len(dropped):,} dropped."),
        doc.More("Kept", [table(kept, "Kind", 30)]),
        doc.More("Dropped, with reasons", [table(dropped, "Why", 160)]),
    ]
    return doc.Section("Antibodies", blocks, key="antibodies", short="Antibodies")


def _cards(measures: Measures) -> list[doc.Card]:
    known = [(what, getattr(measures, key), good) for what, key, good in _KNOWN]
    cards = [doc.Card(what, found, "held-out images", good=good) for what, found, good in known if found is not None]
    return cards + [
        doc.Card(f"Unknown images rejected, {plain(spec, 40)}", found.share_rejected, "images", good=True)
        for spec, found in measures.unknown.items()
    ]


def _diagnostics(record: dict[str, Any]) -> list[tuple[str, str]]:
    found, vaccine, band = record["diagnostics"], record.get("vaccine"), record["antibodies"]["band"]
    margins = f"{found['margin_min']:.3f} at least, median {found['margin_median']:.3f}"
    rows = [
        ("Largest angle from prototype to text (xi)", f"{record['xi_degrees']:.1f}°"),
        _weight(record),
        ("Margin 1 - cos from prototypes to antibodies", margins),
    ]
    around = found.get("neighbourhood")
    if around is not None:
        rows.insert(0, ("Your antibodies cover", _covered(around)))
    if band is not None:
        rows.append(("Band of antibodies (cosine to their class)", f"{band['safe']:.3f} to {band['risk']:.3f}"))
    for key, what in (("crossed", "Antibodies near the other four fifths"), ("near", "Named near things covered")):
        if found.get(f"coverage_{key}") is not None:
            rows.append((f"{what} (within {found['angle']:.0f}°)", percent(found[f"coverage_{key}"])))
    if found.get("eps_align_degrees") is not None:
        rows.append(("Prototypes from the held-out means of their classes", f"{found['eps_align_degrees']:.1f}°"))
    if vaccine is not None:
        rows += [
            ("Vaccine: step kept", str(vaccine["chosen_step"])),
            (
                "Vaccine: margin, and pairs that it pushes",
                f"{vaccine['margin']:.3f}, {percent(vaccine['pushed_share'])}",
            ),
            ("Vaccine: how far features are moved (median)", f"{vaccine['median_move_degrees']:.1f}°"),
        ]
    return rows


def _weight(record: dict[str, Any]) -> tuple[str, str]:
    if record.get("floor") is None:
        return "Weight of the antibodies in the score (lambda_inf)", f"{record['weight']:g}"
    return (
        "Weight of the antibodies in the score (hinge)",
        f"{record['weight']:g}, above a cosine of {record['floor']:.3f}",
    )


def _covered(around: dict[str, Any]) -> str:
    """Say which share of the neighbourhood has an antibody, and what that is counted on."""
    share = Rate(**around["covered"])
    return (
        f"{_rate(share)} of the neighbourhood: of {share.total:,} class names, each left out in turn with the "
        f"antibodies written for it, {share.successes:,} are nearer to an antibody of the others than to any other "
        f"class ({around['named']:,} are one of them)"
    )

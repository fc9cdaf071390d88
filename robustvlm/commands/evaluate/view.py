"""A finished evaluation read back from its folder, and all that is said of it, in the terminal and on the page."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from markupsafe import Markup
from rich.console import Console

from robustvlm.commands.evaluate import corrupted
from robustvlm.commands.evaluate.measures import N_BINS, TOP, calibration_bins
from robustvlm.commands.evaluate.record import SCHEMA, CleanResult
from robustvlm.report import page, repeat, screen
from robustvlm.report import sections as doc
from robustvlm.report.charts import INK, SERIES, as_svg, chart, new_figure
from robustvlm.report.words import as_rate, bar, count_of, duration, interval, percent, plain
from robustvlm.runs.records import read_rows, required
from robustvlm.runs.run import FinishedRun, not_ended, read_finished
from robustvlm.stats import rate

_AGAIN = "give the command again with --fresh"
_NEEDED = ("index", "image_id", "label", "prediction")


@dataclass(frozen=True)
class Evaluation(FinishedRun[CleanResult]):
    """A finished evaluation. The numbers of its summary are its own attributes too: `run.accuracy`."""

    @cached_property
    def rows(self) -> pa.Table:
        """A row for each image, in source order."""
        absent = not_ended(self.folder, "evaluate")
        return read_rows(self.folder / "results.parquet", required(SCHEMA, _NEEDED), if_absent=absent, again=_AGAIN)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, indexed by label."""
        return list((self.manifest.get("data") or {}).get("class_names") or [])

    def __getattr__(self, name: str) -> Any:
        # `evaluate` returned the summary before it made runs.
        if (not name.startswith("_") and hasattr(CleanResult, name)) or name in CleanResult.model_fields:
            return getattr(self.summary, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


def read_run(folder: Path) -> Evaluation:
    """Read a finished evaluation; UserError when it has not ended, is of another kind, or a file is damaged."""
    run = read_finished(folder, "summary.json", CleanResult, kind="evaluate", again=_AGAIN)
    return Evaluation(folder, run.manifest, run.summary)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished evaluation, by default to `report.html` in its folder, and return its path."""
    return page.write_report_of(folder, out, lambda run: evaluate_report(read_run(run)))


def show(run: Evaluation, console: Console) -> None:
    """Print every measure with its interval, and what a reader has to know of the images."""
    said = [remark for remark in run.summary.remarks if remark not in (run.manifest.get("remarks") or ())]
    notes = [*_notes(run.summary), *(f"Note: {plain(remark, 400)}" for remark in said)]
    closing = doc.Closing({"Report": run.report, "Results": run.folder / "results.parquet"})
    screen.show(console, [*_tables(run.summary), *map(doc.Text, notes), verdict(run.summary)], closing)


# All that is said of an evaluation, in the order of the page

_CLASSES = 30
_CONFUSED = 20


def evaluate_report(run: Evaluation) -> doc.Report:
    """Return all that is said of an evaluation."""
    result = run.summary
    report = doc.Report(
        kind="evaluation report",
        name=run.name,
        kicker="Evaluation report",
        facts=doc.facts_line(run.manifest, f", {count_of(result.images, 'labelled images')}"),
        verdicts=[verdict(result)],
        cards=list(_cards(result)),
        sections=[
            doc.Section("Measures", [*_measures(result), *_retrieval(result)], key="measures", short="Measures"),
            *_corruptions(result),
            *_calibration(run),
            *_subgroups(result),
            *_classes(run),
            *_left_out(result),
            doc.cost_section([("Images", f"{len(run.rows):,}"), ("Time", duration(result.seconds))]),
        ],
        footer="Intervals are 95%: exact Clopper-Pearson for shares, bootstrap over images for MacroStd"
        + ("" if _worth(result) == 1 else " (copies of one thing count as one)")
        + ("." if result.corruptions is None else ", Student's t over images for means over corruptions."),
    )
    return repeat.repeatable(report, run.manifest)


def verdict(result: CleanResult) -> doc.Verdict:
    """Return in sentences how often the model is right, whether it is as sure as that, and what it retrieves."""
    lines: list[doc.Line] = []
    if result.images:
        right = "right and accepted" if result.rejected is not None else "right"
        withheld = result.abstained
        lines.append(
            f"The model is {right} on {percent(result.accuracy.value)} ({interval(result.accuracy)}) of "
            f"{count_of(result.images, 'images')} of {count_of(result.classes, 'classes')}."
            + ("" if withheld is None else f" It gives no answer to {percent(withheld.value)} ({interval(withheld)}).")
        )
    refuses = result.rejected is not None or result.abstained is not None
    if result.calibration_error is not None and result.mean_confidence is not None and not refuses:
        sure = result.mean_confidence
        over, under = sure > result.accuracy.high, sure < result.accuracy.low
        judged = "too sure of itself" if over else "not sure enough of itself" if under else ""
        whose = f"It is {judged}: its" if judged else "Its"
        beside = "" if judged else ", within the interval of its accuracy"
        lines.append(
            f"{whose} mean confidence is {percent(sure)}{beside}, and the calibration error "
            f"{percent(result.calibration_error)}."
        )
    if result.corruptions is not None:
        lines.append(corrupted.sentence(result.corruptions, result.accuracy))
    if result.retrieval is not None:
        found = result.retrieval
        first = [percent(one[1].value) for one in (found.text, found.image)]
        lines.append(
            f"Its first choice is a caption of the image for {first[0]} of {count_of(found.images, 'images')}, and the "
            f"right image for {first[1]} of {count_of(found.captions, 'captions')}."
        )
    return doc.Verdict(lines)


def _cards(result: CleanResult) -> Iterator[doc.Card]:
    if result.images:
        yield doc.Card("Accuracy", result.accuracy, "labelled images", good=True)
    if result.corruptions is not None:
        over = as_rate(result.corruptions.accuracy)
        yield doc.Card("Under corruptions", over, "labelled images, on average over the corruptions", good=True)
    if result.top5 is not None:
        yield doc.Card("Top-5 accuracy", result.top5, "labelled images", good=True)
    if result.retrieval is not None:
        yield doc.Card("Captions found, R@1", result.retrieval.text[1], "images", good=True)
        yield doc.Card("Images found, R@1", result.retrieval.image[1], "captions", good=True)


def _tables(result: CleanResult) -> list[doc.Block]:
    corruptions = _corrupted(result)
    return [*_measures(result), *corruptions, *_unevenness(result), *_retrieval(result)]


def _measures(result: CleanResult) -> Iterator[doc.Block]:
    if not result.images:
        return
    several = len({at.tree for at in result.superclass_accuracy}) > 1
    rows: list[doc.Row] = [(f"accuracy, {result.classes:,} classes", doc.Measure.of(result.accuracy))]
    if result.top5 is not None:
        rows.append((f"top-{TOP} accuracy", doc.Measure.of(result.top5)))
    if result.mean_per_class_recall is not None:
        rows.append(("mean per-class recall", doc.Measure.bare(result.mean_per_class_recall)))
    for at in result.superclass_accuracy:
        where = f"{plain(at.tree, 40)}, level {at.level}" if several else f"level {at.level}"
        label = f"superclass accuracy, {where} ({at.superclasses:,} groups)"
        rows.append((label, doc.Measure.of(at.accuracy)))
    refused = (("rejected", "known", result.rejected), ("rejected", "unknown", result.unknown_rejected))
    withheld = (("no answer", "known", result.abstained), ("no answer", "unknown", result.unknown_abstained))
    for end, what, found in (*refused, *withheld):
        if found is not None:
            rows.append((f"{end}, images of {what} classes", doc.Measure.of(found)))
    if result.mean_confidence is not None and result.calibration_error is not None:
        rows.append(("mean confidence", doc.Measure.bare(result.mean_confidence)))
        rows.append((f"calibration error ({N_BINS} bins)", doc.Measure.bare(result.calibration_error)))
    title = f"{plain(result.model, 120)} on {plain(result.data, 120)}"
    yield doc.Table(
        [doc.Column("Measure"), doc.Column("Value, 95% interval")], rows, title=title, strong=frozenset({0})
    )


def _unevenness(result: CleanResult) -> Iterator[doc.Block]:
    several = len({one.tree for one in result.unevenness if one.tree}) > 1
    rows: list[doc.Row] = []
    for one in result.unevenness:
        where = f"{plain(one.tree, 40)}, level {one.level}" if several else f"level {one.level}"
        of = "subgroups of a class" if one.by == "subgroups" else f"classes of a superclass, {where}"
        rows.append((of, *spread_cells(one.value, one.low, one.high, one.by_chance, one.p_value)))
    columns = [doc.Column("Accuracy over the"), *doc.numbers("MacroStd", "By chance", "p")]
    yield doc.Table(columns, rows, title="How evenly")


def spread_cells(value: float, low: float, high: float, by_chance: float, p_value: float) -> tuple[doc.Line, ...]:
    """Return MacroStd with its interval, what chance alone gives, and p, as cells of a row."""
    reach = interval(rate(0, 1).model_copy(update={"low": low, "high": high}))
    return (doc.Measure(percent(value), reach, value, low, high), doc.Measure.bare(by_chance), f"{p_value:.2g}")


def _retrieval(result: CleanResult) -> Iterator[doc.Block]:
    found = result.retrieval
    if found is None:
        return
    rows: list[doc.Row] = [
        (f"R@{k}", *(doc.Measure.of(one.get(k)) for one in (found.text, found.image)))
        for k in sorted({*found.text, *found.image})
    ]
    columns = [doc.Column("Recall"), *doc.numbers("Caption of an image", "Image of a caption")]
    size = f"{count_of(found.images, 'images')} with {count_of(found.captions, 'captions')}"
    caption = f"{size}. A tie with another counts against. Captions of an image count in intervals as one."
    if found.without:
        caption += f" {count_of(found.without, 'images')} without a caption left out."
    if found.cut:
        caption += (
            f" {count_of(found.cut, 'captions')} cut at what the text tower reads, and compared by the beginning."
        )
    yield doc.Table(columns, rows, title="Image-text retrieval", caption=caption, strong=frozenset({0}))


def _notes(result: CleanResult) -> Iterator[str]:
    seen = result.images or (result.retrieval.images if result.retrieval else 0)
    speed = f"{seen / result.seconds if result.seconds else 0.0:,.0f} images/s"
    yield f"{count_of(seen, 'images')} in {result.seconds:.1f} s ({speed}); {result.accuracy.method} intervals"
    if result.unknown and not _judged_unknown(result) and result.images:
        yield f"{count_of(result.unknown, 'images')} of unknown classes left out"
    if result.unreadable:
        name, reason = result.unreadable_reasons[0]
        yield f"{count_of(result.unreadable, 'images')} could not be read; the first, {plain(name)}: {plain(reason)}"


def _judged_unknown(result: CleanResult) -> bool:
    return result.unknown_rejected is not None or result.unknown_abstained is not None


def _left_out(result: CleanResult) -> Iterator[doc.Section]:
    blocks = doc.left_out(result.unreadable_reasons, "could not be read")
    blocks += [doc.Text(f"Note: {plain(remark, 400)}") for remark in result.remarks]
    if result.unknown and not _judged_unknown(result) and result.images:
        blocks.append(doc.Text(f"{count_of(result.unknown, 'images')} of unknown classes left out."))
    if blocks:
        yield doc.Section("What to know of the data", blocks, key="data", short="Data")


def _corrupted(result: CleanResult) -> Iterator[doc.Block]:
    """Yield the tables of common corruptions; an answer withheld is told as such, and not as a refusal."""
    refused, what = (result.rejected, "Refused") if result.abstained is None else (result.abstained, "No answer")
    if result.rejected is not None and result.abstained is not None:
        either = result.rejected.successes + result.abstained.successes
        refused = rate(either, result.rejected.total, independent=result.worth)
        what = "Refused or no answer"
    return corrupted.blocks(result.corruptions, result.accuracy, refused, what=what)


def _corruptions(result: CleanResult) -> Iterator[doc.Section]:
    if result.corruptions is None:
        return
    lead = (
        "Kinds of corruption of ImageNet-C, made of the images as the model sees them. Frost's ice is drawn, so that "
        "figures are not those on ImageNet-C's own files."
    )
    blocks = _corrupted(result)
    yield doc.Section(
        "Common corruptions", [doc.Text(lead, kind="lead"), *blocks], key="corruptions", short="Corruptions"
    )


def _worth(result: CleanResult) -> float:
    """Return how many independent images one is worth; every part is taken to have its share of the copies."""
    return 1.0 if result.worth is None else result.worth / max(1, result.images)


def _cases(worth: float, images: float) -> float:
    """Return how many cases so many images are, an image being worth so much of one; some are one at least."""
    return max(1.0, worth * images)


def _calibration(run: Evaluation) -> Iterator[doc.Section]:
    known = [row for row in _known(run) if row["confidence"] is not None]
    if not known:
        return
    confidences = torch.tensor([row["confidence"] for row in known])
    bins = calibration_bins(confidences, torch.tensor([row["prediction"] == row["label"] for row in known]))
    said = "Images by confidence; where the model is as sure as it is right, points lie on the diagonal."
    draw = partial(reliability, bins.tolist(), key="reliability", worth=_worth(run.summary))
    drawing = doc.Chart(draw, "Reliability", said)
    yield doc.Section("Calibration", [drawing], key="calibration", short="Calibration")


@chart
def reliability(bins: list[list[float]], *, key: str, worth: float = 1.0) -> Markup:
    """Draw the share of right answers over mean confidence, a point a bin of [3, bins] sums, sized by its images."""
    figure, axes = new_figure()
    axes.plot([0, 100], [0, 100], color=INK, lw=0.9, ls=":")
    most = max(bins[0])
    for images, confidence, right in zip(*bins, strict=True):
        if not images:
            continue
        found = rate(round(right), round(images), independent=_cases(worth, images))
        at, colour = 100 * confidence / images, SERIES[0]
        axes.plot([at, at], [100 * found.low, 100 * found.high], color=colour, lw=1, alpha=0.6)
        axes.plot(at, 100 * right / images, "o", color=colour, ms=3 + 6 * (images / most) ** 0.5)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("mean confidence, %")
    axes.set_ylabel("right, %")
    told = "; ".join(
        f"{percent(c / n)} sure, {percent(r / n)} right of {n:.0f}" for n, c, r in zip(*bins, strict=True) if n
    )
    return as_svg(figure, key=key, alt=f"Reliability: {told}.")


def _subgroups(result: CleanResult) -> Iterator[doc.Section]:
    if not result.unevenness:
        return
    lead = (
        "MacroStd is the spread of accuracy over the parts of a class, as a mean over the classes. Few images a part "
        "make a spread out of nothing: \u201cby chance\u201d is what would be seen if all parts of a class were alike, "
        "and p how often as much."
    )
    blocks: list[doc.Block] = [doc.Text(lead, kind="lead"), *_unevenness(result)]
    for one in result.unevenness:
        if one.parts:
            bars = [bar(part.name, part.accuracy) for part in one.parts]
            blocks.append(doc.Bars(bars, "Accuracy per subgroup", title="Subgroups", good=True))
    yield doc.Section("How evenly", blocks, key="evenness", short="Evenness")


def _classes(run: Evaluation) -> Iterator[doc.Section]:
    known, names = _known(run), run.class_names
    if not known:
        return
    images = Counter(row["label"] for row in known)
    hits = Counter(row["label"] for row in known if row["correct"])
    ordered = sorted(images, key=lambda label: (hits[label] / images[label], -images[label], label))[:_CLASSES]
    worth = _worth(run.summary)
    bars = [
        bar(names[label], rate(hits[label], images[label], independent=_cases(worth, images[label])))
        for label in ordered
    ]
    more = f"the {len(bars)} lowest of {len(images):,}" if len(images) > len(bars) else "lowest first"
    pairs = Counter((row["label"], row["prediction"]) for row in known if row["prediction"] != row["label"])
    rows = [
        (doc.Name(names[label]), doc.Name(names[said]), f"{count:,} of {images[label]:,}")
        for (label, said), count in pairs.most_common(_CONFUSED)
    ]
    columns = [doc.Column("Class"), doc.Column("Taken for"), *doc.numbers("Images")]
    blocks: list[doc.Block] = [doc.Bars(bars, f"Recall per class, {more}", title="Classes", good=True)]
    if rows:
        blocks.append(doc.Table(columns, rows, title="Most often confused", only="page"))
    yield doc.Section("Classes", blocks, key="classes", short="Classes")


def _known(run: Evaluation) -> list[dict[str, Any]]:
    rows = run.rows.select(["label", "prediction", "correct", "confidence"]).to_pylist()
    return [row for row in rows if row["correct"] is not None]

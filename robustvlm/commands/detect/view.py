"""A finished detect run read back from its folder, and all that is said of it, in the terminal and on the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from numpy.typing import NDArray
from pydantic import BaseModel
from rich.console import Console
from safetensors import SafetensorError, safe_open

from robustvlm.commands.detect import corrupted, promised, words
from robustvlm.commands.detect import summary as record
from robustvlm.commands.detect.words import Curve, auroc_chart, histogram, roc_chart
from robustvlm.core.files import require_regular
from robustvlm.detect import BASELINES, Promise
from robustvlm.errors import UserError, setting
from robustvlm.report import page, repeat, screen
from robustvlm.report import sections as doc
from robustvlm.report.words import RANGE, count_of, duration, findings, moment, norm_name, plain
from robustvlm.runs.records import read_rows
from robustvlm.runs.run import FinishedRun, not_ended, read_finished

# A finished detect run read back from its folder

_COLUMNS = (("set", pa.string()), ("image_id", pa.string()), ("label", pa.int32()), ("prediction", pa.int32()))


class _Needed(BaseModel):
    config: record.DetectConfig


@dataclass(frozen=True)
class DetectRecord(FinishedRun[record.DetectSummary]):
    """Manifest, settings, summary and rows of one finished detect run."""

    config: record.DetectConfig
    rows: pa.Table

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, indexed by label."""
        return list((self.manifest.get("data") or {}).get("class_names") or [])

    @property
    def shown(self) -> record.ScoreSummary:
        """The score that pictures and histograms are about: the model's own, or the best."""
        by_name = {score.name: score for score in self.summary.scores}
        return by_name.get(record.OWN, by_name[self.summary.best])

    def promise(self, name: str) -> Promise:
        """Return the rule that a score was given (`promise`): its `answered` says which new predictions are answers.

        Raises:
            UserError: the run promised nothing, or has no such score.
        """
        found = None if self.summary.promised is None else promised.promise_of(self.summary.promised, name)
        if found is None:
            asked = setting("promise", "0.9")
            raise UserError(
                f"the run '{self.folder}' has no promise for a score '{name}': run the detection with {asked}"
            )
        return found

    def scores(self, name: str, set_name: str) -> NDArray[np.float64]:
        """Return a score of every image of a set."""
        chosen = np.array(self.rows.column("set").to_pylist()) == set_name
        return np.asarray(self.rows.column(name).to_numpy(), dtype=np.float64)[chosen]


def read_run(folder: Path) -> DetectRecord:
    """Read a finished detect run; UserError when it has not ended, is of another kind, or a file is damaged."""
    again = "run the detection again"
    run = read_finished(folder, "summary.json", record.DetectSummary, kind="detect", needed=_Needed, again=again)
    config = record.DetectConfig.model_validate(run.manifest["config"])
    wanted = [*_COLUMNS, *((score.name, pa.float64()) for score in run.summary.scores)]
    fields = pa.schema([pa.field(name, kind, nullable=False) for name, kind in wanted])
    rows = read_rows(folder / "results.parquet", fields, if_absent=not_ended(folder, "detect"), again=again)
    return DetectRecord(folder, run.manifest, run.summary, config, rows)


# All that is said of a detect run, in the order of the page

# Lines in a chart of ROC curves: more cannot be told apart.
_CURVES = 5
_INTERVALS = (
    f"Intervals are 95%: DeLong's for AUROCs, bootstrap for the other metrics, exact Clopper{RANGE}Pearson for shares."
)


def show(run: DetectRecord, console: Console) -> None:
    """Print the closing tables of a detect run: every score on every set, attacks, what was skipped, the verdict."""
    closing = doc.Closing({"Report": run.report, "Results": run.folder / "results.parquet"})
    screen.show(console, detect_report(run), closing)


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished detect run, by default to `report.html` in its folder, and return its path."""
    return page.write_report_of(folder, out, lambda run: detect_report(read_run(run)))


def detect_report(run: DetectRecord) -> doc.Report:
    """Return all that is said of a detect run."""
    summary = run.summary
    lines = [words.verdict(summary), words.comparison(summary), words.words_sentence(summary)]
    lines += [words.own_sentence(summary), words.attack_sentence(summary)]
    lines += [corrupted.sentence(summary, run.shown.name), promised.sentence(summary)]
    report = doc.Report(
        kind="detection report",
        name=run.name,
        kicker="Detection report",
        facts=_facts(run),
        verdicts=[doc.Verdict([line for line in lines if line], tone=words.tone(summary))],
        cards=_cards(run),
        sections=[
            _scores(run),
            doc.Section("Curves", [doc.Pair(_curves(run))], key="curves", short="Curves"),
            *_under_attack(run),
            *corrupted.section(summary, run.shown.name),
            *promised.section(summary),
            *_mistakes(run),
            *_checks(summary),
            doc.cost_section(_cost(summary)),
        ],
        footer=_INTERVALS,
    )
    return repeat.repeatable(report, run.manifest)


def _facts(run: DetectRecord) -> list[doc.Inline]:
    config, summary, created = run.config, run.summary, run.manifest.get("created")
    line: list[doc.Inline] = ["Model ", doc.Code(config.model), f": {summary.known.images:,} known images of "]
    line.append(doc.Code(config.known))
    for named, part in zip(config.unknown, summary.unknown, strict=True):
        line += [f", {part.images:,} unknown ones of ", doc.Code(named.spec)]
    return [*line, f", {moment(created)}"] if created else line


def _cards(run: DetectRecord) -> list[doc.Card]:
    summary, shown = run.summary, run.shown
    first = doc.Card("Right class", summary.accuracy, "known images, whether refused or not", good=True)
    if summary.own is not None:
        accepted = doc.Card(
            "Known images accepted", summary.own.accepted_known, "at the model's own threshold", good=True
        )
        unknown = summary.own.accepted_unknown.items()
        return [
            first,
            accepted,
            *(doc.Card("Unknown images accepted", r, f"of {plain(name, 40)}") for name, r in unknown),
        ]
    cards = [first]
    for part, on in zip(summary.unknown[:2], shown.on, strict=False):
        groups = f" from {part.groups:,} independent ones" if part.groups < part.images else ""
        small = f"95% interval {_of(on.auroc).interval}; {part.images:,} unknown images{groups}"
        cards.append(doc.Card(f"AUROC on {plain(part.name, 40)}, {shown.title}", _of(on.auroc).text, small))
    return cards


def _scores(run: DetectRecord) -> doc.Section:
    """Return the tables of every score on every set of unknown images."""
    summary, config = run.summary, run.config
    lead: list[doc.Inline] = [
        "For every score, higher means more likely known. AUROC: the chance that a known image scores above an unknown "
        "one. FPR95: the share of unknown images accepted where 95% of the known ones are."
    ]
    if config.temperature != 1:
        lead.append(f" Energies divide the logits by {config.temperature:g}.")
    if summary.fit is not None:
        lead += [f" Scores that learn from images have seen {summary.fit.images:,} of ", doc.Code(str(config.fit)), "."]
    sets = ", ".join(f"{part.images:,} {plain(part.name, 40)}" for part in summary.unknown)
    titles = {score.name: score.title for score in summary.scores}
    oracles = words.oracle_titles(summary)
    names: list[doc.Line] = [
        [s.title, " ", doc.Small("oracle")] if s.title in oracles else s.title for s in summary.scores
    ]
    each = [(name, score) for name, score in zip(names, summary.scores, strict=True)]
    rows: list[doc.Row] = [
        (
            name,
            *(_of(found) for on in score.on for found in (on.auroc, on.fpr95)),
            doc.Small(words.needs(score)),
            f"{score.microseconds:.1f}",
        )
        for name, score in each
    ]
    rivals: list[doc.Row] = [(name, *(doc.Small(words.versus(on, titles)) for on in score.on)) for name, score in each]
    precision: list[doc.Row] = [
        (
            name,
            doc.Small(score.source),
            *(_of(found) for on in score.on for found in (on.aupr_in, on.aupr_out)),
            f"{score.threshold:.4g}",
        )
        for name, score in each
    ]
    best = [score.name for score in summary.scores].index(summary.best)
    blocks: list[doc.Block] = [
        doc.Text(lead, kind="lead"),
        doc.Chart(partial(auroc_chart, summary.scores, [part.name for part in summary.unknown], key="auroc")),
        doc.Table(
            [
                doc.Column("Score"),
                *_by_set(summary.unknown, "AUROC", "FPR95"),
                doc.Column("Needs"),
                doc.Column("µs", number=True),
            ],
            rows,
            title=f"Known ({count_of(summary.known.images, 'images')}) against unknown ({sets})",
            caption=f"µs an image: of the score alone; the encoder takes {summary.encode_ms:.2f} ms an image.",
            strong=frozenset({best}),
        ),
        doc.Table(
            [doc.Column("Score"), *(doc.Column(plain(part.name, 40)) for part in summary.unknown)],
            rivals,
            title="Against the best other baseline",
            caption="Difference of AUROC to the best of MSP, MCM, MaxLogit and energy that is another score, on the "
            "same images, with its p-value by paired bootstrap, adjusted (Holm) for all scores of the column.",
            only="page",
        ),
        doc.More(
            "Average precision (AUPR), and where the scores come from",
            [
                doc.Table(
                    [
                        doc.Column("Score"),
                        doc.Column("Source"),
                        *_by_set(summary.unknown, "AUPR-in", "AUPR-out"),
                        doc.Column("Threshold (95%)", number=True),
                    ],
                    precision,
                    caption="AUPR depends on how many known and unknown images there are: compare it within a column "
                    "only.",
                )
            ],
        ),
    ]
    return doc.Section("How well every score tells known from unknown", blocks, key="scores", short="Scores")


def _of(found: record.Measured) -> doc.Measure:
    return doc.Measure.between(found.value, found.low, found.high)


def _by_set(sets: Sequence[record.SetSummary], *titles: str) -> list[doc.Column]:
    return [doc.Column(title, group=plain(part.name, 40)) for part in sets for title in titles]


def _curves(run: DetectRecord) -> list[doc.Chart]:
    """Return ROC curves for every set, and the distributions of the shown score and of the best baseline."""
    unknown = [part.name for part in run.summary.unknown]
    caption = "The upper dotted line accepts 95% of the known images."
    charts = [
        doc.Chart(
            partial(_roc, run, name, key=f"roc{i}"), f"ROC, {plain(name, 40)}", caption if name == unknown[-1] else ""
        )
        for i, name in enumerate(unknown)
    ]
    scores = {score.name: score for score in run.summary.scores}
    baselines = [scores[name] for name in BASELINES if name in scores]
    best = max(baselines, key=lambda score: sum(on.auroc.value for on in score.on), default=None)
    chosen = list({score.name: score for score in (run.shown, best) if score is not None}.values())
    for i, score in enumerate(chosen):
        last, own = i == len(chosen) - 1, score.name == record.OWN
        whose = "of the model" if own else "that accepts 95% of the known images"
        caption = f"Dashed: the threshold {whose}. The outermost half per cent on either side is drawn at the edge."
        draw = partial(_histogram, run, score, key=f"histogram{i}")
        charts.append(doc.Chart(draw, "Scores of known and unknown images", caption if last else ""))
    return charts


def _roc(run: DetectRecord, unknown: str, *, key: str) -> Markup:
    """Draw the curves of the model's own score, the best ones on this set, and the best baseline."""
    by_auroc = sorted(run.summary.scores, key=lambda score: -_auroc(score, unknown))
    baseline = next((score for score in by_auroc if score.name in BASELINES), None)
    first = [score for score in by_auroc if score.name == record.OWN] + by_auroc[: _CURVES - 1]
    chosen = {score.name: score for score in [*first, *([baseline] if baseline else [])]}
    curves = [
        Curve(score.title, run.scores(name, "known"), run.scores(name, unknown)) for name, score in chosen.items()
    ]
    return roc_chart(curves, key=key, unknown=plain(unknown, 40))


def _auroc(score: record.ScoreSummary, unknown: str) -> float:
    return next(on.auroc.value for on in score.on if on.unknown == unknown)


def _histogram(run: DetectRecord, score: record.ScoreSummary, *, key: str) -> Markup:
    unknown = [(plain(part.name, 40), run.scores(score.name, part.name)) for part in run.summary.unknown]
    return histogram(run.scores(score.name, "known"), unknown, score.threshold, key=key, title=score.title)


def _under_attack(run: DetectRecord) -> Iterator[doc.Section]:
    summary, config = run.summary, run.config.under_attack
    if not summary.attacked or config is None:
        return
    ball = f"{norm_name(config.norm)}, ε = {plain(config.eps_text, 20)}"
    lead = (
        "Each score is attacked for its own sake, through the encoder, by somebody who knows it "
        f"({plain(', '.join(config.attack))}): known images until the score refuses them, unknown ones until it "
        "accepts them. The worst score met counts. Stronger attacks may exist."
    )
    own = "; for the model's own score, at its own threshold" if summary.own is not None else ""
    columns = [doc.Column("Unknown images")]
    columns += [doc.Column(t, group="AUROC") for t in ("clean", "unknown attacked", "known attacked", "both attacked")]
    columns += [doc.Column(t, group=f"{who} accepted") for who in ("Unknown", "Known") for t in ("clean", "attacked")]
    blocks: list[doc.Block] = [
        doc.Text(lead, kind="lead"),
        doc.Table(
            columns,
            [row for score in summary.attacked for row in _attacked(score)],
            caption=f"On the images that were attacked, at most {config.limit} of each set. Accepted: at the threshold "
            f"that accepts 95% of all clean known images{own}.",
        ),
    ]
    if summary.adversarial is not None:
        found, titles = summary.adversarial, {score.name: score.title for score in summary.scores}
        rest = (
            "the clean known images, right or wrong,"
            if found.unattacked is None
            else f"{found.unattacked} more, right and"
        )
        blocks.append(
            doc.Table(
                [doc.Column("Score"), doc.Column("AUROC, clean against adversarial")],
                [(titles[name], _of(value)) for name, value in found.auroc.items()],
                title="Do scores notice adversarial images?",
                caption=f"{found.fooled} of {found.attacked} known images were made to be misclassified as surely as "
                "possible, by an attack that ignores every score; AUROC between "
                f"{rest} not attacked, and these. An attacker who knows the score evades it: see above.",
            )
        )
    yield doc.Section(f"Under attack ({ball})", blocks, key="attack", short="Under attack")


def _attacked(score: record.AttackedScore) -> list[doc.Row]:
    """Return the rows of one attacked score below its name, a row a set."""
    rows: list[doc.Row] = [score.title]
    for on in score.on:
        aurocs = (on.auroc_clean, on.auroc_intrude, on.auroc_deny, on.auroc_both)
        unknown = (doc.Measure.bare(on.accepted_clean), doc.Measure.of(on.accepted_attacked))
        known = (doc.Measure.bare(score.accepted_clean), doc.Measure.of(score.accepted_attacked))
        rows.append((doc.Name(on.unknown, 40), *map(_of, aurocs), *unknown, *known))
    return rows


def _mistakes(run: DetectRecord) -> Iterator[doc.Section]:
    found = load_mistakes(run)
    if found:
        lead = f"The threshold is {run.shown.threshold:.4g}; only images on its wrong side are shown, the worst first."
        pictures = [doc.Pictures(some, title, small=True) for title, some in found]
        title = f"Most wrongly accepted and refused, by {run.shown.title}"
        yield doc.Section(title, [doc.Text(lead, kind="lead"), *pictures], key="mistakes", short="Mistakes")


def load_mistakes(run: DetectRecord) -> list[tuple[str, list[doc.Picture]]]:
    """Return the stored images by set, the worst first, with a title; files that cannot be read are left out."""
    found: dict[str, list[tuple[int, doc.Picture]]] = {}
    for path in sorted((run.folder / "gallery").glob("*.safetensors")):
        try:
            require_regular(path)
            with safe_open(path, framework="np") as file:
                image, about = file.get_tensor("image"), file.metadata() or {}
            kept = about["known"] == "1"
            title = "Known, and refused" if kept else f"Unknown ({plain(about['set'], 40)}), and accepted"
            said, label = (_name(run.class_names, int(about[key])) for key in ("prediction", "label"))
            line: list[doc.Inline] = [f"Score {float(about['score']):.4g}"]
            line += ["; seen as ", doc.Name(said, 60)] if said else []
            line += ["; is ", doc.Name(label, 60)] if label and label != said else []
            image_id = plain(about["image_id"])
            shown = (page.data_uri(image), f"Image {image_id}", "")
            found.setdefault(title, []).append(
                (int(about["rank"]), doc.Picture([shown], [*line, ". ", doc.Code(image_id)]))
            )
        except (SafetensorError, OSError, KeyError, ValueError, IndexError):
            continue
    return [
        (title, [picture for _, picture in sorted(some, key=lambda item: item[0])]) for title, some in found.items()
    ]


def _name(names: list[str], index: int) -> str:
    return plain(names[index], 60) if 0 <= index < len(names) else ""


def _checks(summary: record.DetectSummary) -> Iterator[doc.Section]:
    skipped: list[tuple[str, doc.Line]] = [(name, plain(reason, 300)) for name, reason in summary.skipped.items()]
    blocks: list[doc.Block] = [doc.Checks(findings(summary.checks))] if summary.checks else []
    if skipped:
        blocks.append(doc.Facts(skipped, kind="sentences", title="Scores that were not used", only="both"))
    unreadable = [(image.id, image.reason) for image in summary.unreadable]
    blocks += doc.left_out(unreadable, "could not be read, and left out of every number")
    if blocks:
        yield doc.Section("Checks", blocks, key="checks", short="Checks")


def _cost(summary: record.DetectSummary) -> list[tuple[str, doc.Line]]:
    images = summary.known.images + sum(part.images for part in summary.unknown)
    return [
        ("Images scored", f"{images:,}" + (f", and {summary.fit.images:,} to learn from" if summary.fit else "")),
        ("Encoder", f"{summary.encode_ms:.2f} ms per image"),
        ("Scores", f"at most {max(score.microseconds for score in summary.scores):.0f} µs per image each"),
        ("Time of the last session", duration(summary.seconds)),
    ]

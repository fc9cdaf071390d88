"""What a training run has to show, of a model or of a purifier: its record, and the report with its curves."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from robustvlm.report import page, repeat
from robustvlm.report import sections as doc
from robustvlm.report.charts import level_norms, loss_curves, mean_curves, rate_curves
from robustvlm.report.words import (
    RANGE,
    copies_counted,
    count_of,
    duration,
    finding,
    interval,
    manifest_rows,
    norm_name,
    percent,
    plain,
    sentence,
)
from robustvlm.runs.manifest import trained_on_attacks
from robustvlm.runs.run import FinishedRun, manifest_of, read_finished
from robustvlm.runs.settings import Observer
from robustvlm.stats import Mean, Rate
from robustvlm.training import Estimate, TrainingObserver, Validation, Warned
from robustvlm.training.history import History

# What a training run has to show: its history, and the facts that explain it

NAME = "training.json"


class TrainingSummary(BaseModel):
    """The content of `training.json`, written when a training run has ended.

    Args:
        kind: the command ("finetune", "purify"); method: the loss.
        settings: choices and fitted constants of the method.
        trained_parameters, parameters: numbers of values trained and in all.
        ranks: processes that trained; steps: optimiser steps in all.
        best_by: the measure that chose the weights, None where those of the last step were kept; watched: the one to
            show then. Runs of earlier versions call it best_by all the same: only `history.best_step` tells.
        worth: how many independent images those validated on are worth; None in runs that counted copies one by one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    kind: str
    method: str
    settings: dict[str, Any] = {}
    trained_parameters: int
    parameters: int
    ranks: int = 1
    best_by: str | None = None
    watched: str | None = None
    worth: float | None = None
    steps: int
    history: History

    @property
    def shown(self) -> str | None:
        """The measure that tells in one number what came of the training."""
        return self.best_by or self.watched


# The HTML report of a training run: one file that needs no network and no script

_FIRST = ("clean accuracy", "robust accuracy")
_SCORE_AT = "score at "  # of a purifier: the noise follows
_NO_WARNING = (
    "None: no constant features, masked or useless gradients, overfitting or collapse was noticed in the validations."
)
_LEVEL = re.compile(r"(.+), level (\d+)")


def load_training_run(folder: Path) -> FinishedRun[TrainingSummary]:
    """Read a finished training run; UserError when it has not ended or a file is damaged."""
    kind = manifest_of(folder)["kind"]
    found: FinishedRun[TrainingSummary] = read_finished(folder, NAME, TrainingSummary, kind=kind, needed=_Needed)
    return found


class _Config(BaseModel):
    """The settings that a report reads."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    data: str
    norm: str = ""
    eps_text: str = ""
    inner_steps: int = 0


class _Needed(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    config: _Config


def write_training_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a finished training run, by default to `report.html` in its folder, and return its path."""
    return page.write_report_of(folder, out, lambda run: training_report(load_training_run(run)))


def training_report(run: FinishedRun[TrainingSummary]) -> doc.Report:
    """Return all that is said of a training run."""
    summary, history, config = run.summary, run.summary.history, run.manifest["config"]
    inner: list[doc.Inline] = []
    if "eps_text" in config and trained_on_attacks(run.manifest):
        radius = f"{norm_name(config['norm'])} {plain(config['eps_text'], 20)}"
        inner = [f", inner attack {radius}, {config['inner_steps']} steps"]
    purpose = "" if history.best_step is None else " for choosing weights"
    advice = [f"Validations are quick estimates{purpose}. Measure the result with "]
    measured = doc.Code(f"robustvlm attack {plain(run.folder, 200)} --attack standard", limit=250)
    settings: list[doc.Block] = []
    if summary.settings:
        rows = manifest_rows({"method": summary.settings})
        settings = [doc.More("Settings and fitted constants of the method", [doc.Facts(rows, kind="settings")])]
    report = doc.Report(
        kind="training report",
        name=run.name,
        kicker=f"Training report · {plain(summary.kind, 20)}: {plain(summary.method, 40)}",
        facts=doc.facts_line(run.manifest, *inner),
        verdicts=[doc.Verdict([verdict(summary), [*advice, measured, " on data that chose nothing."]])],
        cards=[
            doc.Card(sentence(name), rate, "validation images, kept weights", good=True)
            for name, rate in _rates(history)
        ],
        sections=[
            doc.Section("How training went", [doc.Pair(_charts(summary))], key="curves", short="Curves"),
            *_measures(summary),
            _warnings(history),
            doc.cost_section(cost_rows(summary)),
        ],
        footer=_footer(summary, config),
    )
    return repeat.repeatable(report, run.manifest, *settings)


def _footer(summary: TrainingSummary, config: Mapping[str, Any]) -> str:
    """Say what the intervals are, by the measures that there are; "", the usual, of shares alone without copies."""
    found = [measure for at in summary.history.validations for measure in at.measures.values()]
    kinds = [Rate if isinstance(measure, Rate) else Mean for measure in found if isinstance(measure, Rate | Mean)]
    if summary.worth is None:
        copies = copies_counted(config.get("val") or config["data"])
    else:
        fewer = any(measure.total > summary.worth for measure in found if isinstance(measure, Rate | Mean))
        copies = "Copies of one thing count once in them." * fewer
    if Mean not in kinds and not copies:
        return ""
    of_shares = f"exact 95% Clopper{RANGE}Pearson intervals" + " of shares" * (Mean in kinds)
    of_means = "Student's 95% t intervals" + " of means" * (Rate in kinds)
    said = [words for kind, words in ((Rate, of_shares), (Mean, of_means)) if kind in kinds]
    return " ".join(filter(None, [f"Intervals are {' and '.join(said)}." if said else "", copies * bool(said)]))


def training_closing(run: FinishedRun[TrainingSummary]) -> doc.Closing:
    """Return where the model and its report are; of a purifier also the spec that smooths it."""
    folder, smoothed = str(run.folder), {}
    if run.summary.kind == "purify" and run.summary.shown is not None:
        smoothed = {"Smoothed": f"{folder}+smooth:{run.summary.shown.removeprefix(_SCORE_AT)}"}
    return doc.Closing({"Model": folder, **smoothed, "Report": run.folder / "report.html"})


def _measures(summary: TrainingSummary) -> list[doc.Section]:
    """Return the table of every measure before training and of the kept weights."""
    kept, history = summary.history.best(), summary.history
    if kept is None:
        return []
    first, title = history.validations[0], ""
    columns = [doc.Column("Measure"), doc.Column("Before training"), doc.Column("Kept weights")]
    if summary.kind == "purify":
        title = "Gaussian robustness score, images held out"
        columns = [doc.Column("Noise"), doc.Column("Encoder alone"), doc.Column("This model")]
    rows: list[doc.Row] = [
        (
            plain(name.removeprefix(_SCORE_AT), 80),
            *(doc.Measure.of(found.measures.get(name)) for found in (first, kept)),
        )
        for name in _order(kept)
    ]
    return [doc.Section("Before and after", [doc.Table(columns, rows, title=title)], key="measures", short="Measures")]


def _warnings(history: History) -> doc.Section:
    found = [
        finding(
            "warning", plain(warning.message, 400), f"{plain(sentence(warning.name), 80)}, after {warning.step:,} steps"
        )
        for warning in history.warnings
    ]
    blocks = [doc.Checks(found, none=_NO_WARNING), *doc.left_out(sorted(history.skipped.items()), "not used")]
    return doc.Section("Warnings", blocks, key="warnings", short="Warnings")


def verdict(summary: TrainingSummary) -> str:
    """Say in one sentence what training did to the measure that chose the weights, or is watched, or how long it went
    on."""
    history, by = summary.history, summary.shown
    kept, first = history.best(), history.validations[0] if history.validations else None
    if by is None or kept is None or first is None or kept.number(by) is None:
        return f"Trained for {summary.steps:,} steps; the weights of the last one were kept."
    change = f"{by.capitalize()} went {_from_to(first, kept, by)}"
    if by != "clean accuracy" and kept.number("clean accuracy") is not None:
        change += f", clean accuracy {_from_to(first, kept, 'clean accuracy')}"
    if history.best_step is None:
        return f"{change}, on images that were held out and chose nothing: the weights of the last step were kept."
    return (
        f"{change}, on the validation images, which chose the weights (those of step {kept.step:,} of "
        f"{summary.steps:,}): too high for a claim, measure on other images."
    )


def _from_to(first: Validation, kept: Validation, name: str) -> str:
    both = [doc.Measure.of(found.measures.get(name)) for found in (first, kept)]
    return "from " + " to ".join(f"{found.text} ({found.interval})" if found.interval else found.text for found in both)


def _order(kept: Validation) -> list[str]:
    return sorted(kept.measures, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def cost_rows(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return the cost of a training as rows of label and value."""
    history = summary.history
    share = summary.trained_parameters / max(1, summary.parameters)
    rows = [
        ("Steps", f"{summary.steps:,}, {history.seconds / max(1, summary.steps):.3g} s each"),
        ("Images", f"{history.images:,}, {history.images_per_second:,.1f} a second"),
        ("Encoder passes", f"{history.passes:,} (forward and backward)"),
        ("Training", duration(history.seconds)),
        ("Validation", duration(history.validation_seconds)),
        ("Peak memory", f"{history.peak_memory / 2**20:,.0f} MiB"),
        ("Trained", f"{summary.trained_parameters:,} of {summary.parameters:,} parameters ({percent(share)})"),
        ("Processes", f"{summary.ranks}"),
    ]
    if history.estimate is not None:
        said = history.estimate
        rows.append(("Estimated beforehand", f"{said.passes:,} passes, {duration(said.seconds)}"))
    return rows


def _rates(history: History) -> list[tuple[str, Rate]]:
    kept = history.best()
    measures = {} if kept is None else kept.measures
    found = ((name, measures.get(name)) for name in (*_FIRST, "noise accuracy"))
    return [(name, rate) for name, rate in found if isinstance(rate, Rate)]


def _charts(summary: TrainingSummary) -> list[doc.Chart]:
    """Return the charts that there is data for."""
    history = summary.history
    terms: dict[str, list[tuple[int, float]]] = {}
    for entry in history.steps:
        for name, value in entry.terms.items():
            terms.setdefault(plain(name, 40), []).append((entry.step, value))
    rates: dict[str, list[tuple[int, Rate]]] = {}
    means: dict[str, list[tuple[int, Mean]]] = {}
    for found in history.validations:
        for name, measure in found.measures.items():
            if isinstance(measure, Rate):
                rates.setdefault(plain(name, 40), []).append((found.step, measure))
            elif isinstance(measure, Mean) and measure.value is not None:
                means.setdefault(plain(name, 40), []).append((found.step, measure))
    order = sorted(rates, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    best, by = history.best_step, summary.best_by
    dotted = "" if best is None else f" Dotted: the step whose weights were kept, chosen by {by}."
    charts = []
    if terms:
        caption = "Means over the training images; the one called loss is what is minimised."
        charts.append(doc.Chart(partial(loss_curves, terms, key="loss"), "Terms of the loss", caption))
    if rates:
        caption = f"On images that are not trained on; 95% bands for the first two.{dotted}"
        draw = partial(rate_curves, {name: rates[name] for name in order}, key="validation", kept=best)
        charts.append(doc.Chart(draw, "Validation", caption))
    if means:
        caption = "Of the validation images, with 95% bands."
        charts.append(doc.Chart(partial(mean_curves, means, key="means"), "Means", caption))
    kept = history.best()
    if kept is not None and by_level(kept):
        caption = (
            "Mean norm of the text embeddings in the ball: parents should lie nearer to the origin than their children."
        )
        draw = partial(level_norms, by_level(history.validations[0]), by_level(kept), key="norms")
        charts.append(doc.Chart(draw, "Norms by level", caption))
    return charts


def by_level(found: Validation) -> dict[int, float]:
    """Return the measures that are given by level of a tree ("text norm, level 1"), the level first.

    Example:
        >>> by_level(Validation(step=0, measures={"text norm, level 0": 0.7, "text norm, level 1": 0.5, "x": 1.0}))
        {0: 0.7, 1: 0.5}
    """
    matches = ((_LEVEL.fullmatch(name), found.number(name)) for name in found.measures)
    return {int(match[2]): value for match, value in matches if match is not None and value is not None}


# What a training or a loop tells meanwhile, in the words that every run's observer takes

_TERMS = 4


def told(observer: Observer) -> TrainingObserver:
    """Return an observer of a training that tells it to the observer of a run."""
    return _Told(observer)


def counted(observer: Observer) -> Callable[[int], None]:
    """Return what a loop calls with the number of pieces done so far, and the observer is told how many more that is.

    Example:
        >>> class Lines(Observer):
        ...     def advance(self, count=1, **shown):
        ...         print(count)
        >>> tell = counted(Lines())
        >>> tell(3), tell(5)
        3
        2
        (None, None)
    """
    before = 0

    def tell(done: int) -> None:
        nonlocal before
        observer.advance(done - before)
        before = done

    return tell


class _Told(TrainingObserver):
    def __init__(self, observer: Observer) -> None:
        self._observer, self._step = observer, 0

    def began(self, total: int, done: int) -> None:
        if done:
            self._observer.say(f"Going on after {done:,} of {total:,} steps.")
        self._step = done
        self._observer.begin("Training", total, done)

    def estimated(self, estimate: Estimate) -> None:
        cost = f"{count_of(estimate.passes, 'encoder passes')}, about {duration(estimate.seconds)}"
        self._observer.say(f"{count_of(estimate.steps, 'steps')} to go: {cost}.")

    def stepped(self, step: int, terms: Mapping[str, float]) -> None:
        shown = {name: f"{value:.3g}" for name, value in list(terms.items())[:_TERMS]}
        self._observer.advance(step - self._step, **shown)
        self._step = step

    def validated(self, found: Validation) -> None:
        shown = [] if found.train_loss is None else [f"loss {found.train_loss:.4g}"]
        for name, value in found.measures.items():
            if isinstance(value, Rate | Mean):
                shown.append(f"{name} {_words(value)}")
        self._observer.say(f"Step {found.step:,}: {', '.join(shown)}")

    def warned(self, warning: Warned) -> None:
        self._observer.warn(f"{warning.name}: {warning.message}")


def _words(found: Rate | Mean) -> str:
    if found.value is None:
        return "-"
    if isinstance(found, Mean):
        return f"{found.value:.3f}"
    return f"{percent(found.value)} ({interval(found)})"

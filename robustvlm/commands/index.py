"""Several runs at once: a page over a folder of them, and what other formats than a page tell of all of them.

The page has a row a run with its headline figure, security curves, and what could not be read.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from markupsafe import Markup

from robustvlm.commands import command_of, open_run, report_of
from robustvlm.errors import UserError
from robustvlm.report.document import Batch, Gate, LeftOut, Told
from robustvlm.report.page import drawing, page, write_page
from robustvlm.report.sections import Measure, Report
from robustvlm.report.words import DASH, norm_name, plain
from robustvlm.runs.manifest import NAME
from robustvlm.runs.run import FinishedRun, manifest_of
from robustvlm.runs.settings import Observer
from robustvlm.stats import Mean, Rate
from robustvlm.text import one_line

_CURVES = 24
"""Security curves at most, those of the newest runs."""

SORT = """
document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
  const head = button.parentElement, body = document.querySelector("tbody");
  const up = head.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const of = row => row.children[column].dataset.key;
  const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * of(a).localeCompare(of(b), "en", { numeric: true }));
  body.append(...rows);
}));
"""
"""The only script of any page: it sorts the rows by the column clicked on. The page allows it by its digest."""


@dataclass(frozen=True)
class Headline:
    """The figure that a run is known by; `value` is the number it is sorted by, None for none."""

    what: str
    shown: Measure
    value: float | None = None

    @classmethod
    def of(cls, what: str, found: Rate) -> Headline:
        """Return a rate as a headline."""
        return cls(what, Measure.of(found), found.value)


@dataclass(frozen=True)
class Entry:
    """A run in a folder, or what is wrong with it."""

    name: str
    folder: Path
    manifest: dict[str, Any]
    headline: Headline | None = None
    curve: Callable[[str], Markup] | None = None
    fault: str = ""

    @property
    def radius(self) -> str:
        """The radii in words."""
        config = self.manifest.get("config") or {}
        texts = config.get("eps_text") or []
        texts = [texts] if isinstance(texts, str) else texts
        if texts:
            return f"{norm_name(str(config.get('norm', '')))} {', '.join(plain(text, 20) for text in texts)}"
        against = f", against {plain(config['threat'], 20)}" if isinstance(config.get("threat"), str) else ""
        return f"noise {config['sigma']:g}{against}" if isinstance(config.get("sigma"), float) else DASH

    @property
    def cells(self) -> list[str]:
        """Command, model, data and radius."""
        config = self.manifest.get("config") or {}
        found = [self.manifest.get("kind"), config.get("model") or config.get("encoder")]
        found += [config.get("data") or config.get("known")]
        return [*(plain(text, 60) if text else DASH for text in found), self.radius]

    def link(self, of: Path) -> str:
        """Return the address of its report for a page in the folder `of`; "" where it has none."""
        report = self.folder / "report.html"
        if not report.is_file():
            return ""
        return "./" + quote_from_bytes(os.fsencode(os.path.relpath(report, of)))

    def as_dict(self) -> dict[str, Any]:
        """Return it for programs."""
        kind, model, data, radius = self.cells
        about = {"name": self.name, "folder": str(self.folder), "kind": kind, "model": model, "data": data}
        about |= {"radius": radius, "created": str(self.manifest.get("created") or "")}
        found = self.headline
        figure = {"what": found.what, "value": found.value, "interval": found.shown.interval} if found else None
        return about | {"figure": figure} | ({"fault": self.fault} if self.fault else {})


def holds_runs(folder: Path) -> bool:
    """Whether a folder is no run itself, and has runs in it."""
    return not (folder / NAME).exists() and folder.is_dir() and any(_runs(folder))


def _runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (path / NAME).is_file())


def entries(folder: Path, observer: Observer | None = None) -> list[Entry]:
    """Return the runs in a folder, the newest first, those that cannot be read last."""
    told, paths = observer or Observer(), _runs(folder)
    told.begin("Reading runs", len(paths))
    found = []
    for path in paths:
        found.append(_entry(path))
        told.advance()
    found.sort(key=lambda entry: entry.name)
    found.sort(key=lambda entry: str(entry.manifest.get("created") or ""), reverse=True)
    return sorted(found, key=lambda entry: bool(entry.fault))


def _entry(path: Path) -> Entry:
    manifest: dict[str, Any] = {}
    try:
        manifest = manifest_of(path)
        run = open_run(path)
        entry = Entry(path.name, path, manifest, _headline(run), _curve(run))
        _ = entry.cells  # what the page asks for: an odd manifest shows here
        return entry
    except Exception as error:  # whatever a damaged file does: the other runs are to be seen all the same
        said = one_line(error, limit=300) if isinstance(error, UserError) else type(error).__name__
        return Entry(path.name, path, {}, fault=said or type(error).__name__)


def _headline(run: FinishedRun[Any]) -> Headline | None:
    summary = run.summary
    if run.kind == "attack":
        at = summary.per_eps[-1] if summary.per_eps else None
        if summary.images.uncounted:
            return None
        if at is None:
            return Headline.of("clean accuracy", summary.clean_accuracy)
        from robustvlm.commands.attack.record import robust_bounds

        what = f"robust at {plain(at.eps_text, 20)}"
        unsure = summary.unfinished and at.undecided
        found = at.robust_accuracy
        return Headline(what, Measure(robust_bounds(at)), found.value) if unsure else Headline.of(what, found)
    if run.kind == "evaluate":
        if summary.images:
            return Headline.of("accuracy", summary.accuracy)
        return Headline.of("caption of an image, R@1", summary.retrieval.text[1])
    if run.kind == "certify":
        from robustvlm.commands.certify.record import certified

        return Headline.of("certified", certified(summary))
    if run.kind == "detect":
        best = next(score for score in summary.scores if score.name == summary.best)
        on = best.on[0].auroc
        return Headline(f"AUROC, {plain(best.title, 30)}", Measure.between(on.value, on.low, on.high), on.value)
    if run.kind == "judge":
        # The undefended models beside them are what the defences are compared with, and no findings of the run.
        defended = [model for model in summary.models if model.facts.base is not None]
        best = max(defended, key=lambda model: model.worst.successes, default=None)
        return None if best is None else Headline.of(f"robust, {plain(best.spec, 40)}", best.worst)
    if run.kind == "immunize":
        return next((Headline.of("unknown rejected", one.share_rejected) for one in _unknown(summary)), None)
    if run.kind == "tune-prompts":
        return None if summary.tuned is None else Headline.of("accuracy, validation", summary.tuned.accuracy)
    rates = {name: one for name, one in _measures(run).items() if isinstance(one, Rate | Mean)}
    for name in ("robust accuracy", "clean accuracy", *rates):
        if name in rates:
            return Headline(f"{plain(name, 40)}, validation", Measure.of(rates[name]), rates[name].value)
    return None


def _measures(run: FinishedRun[Any]) -> Mapping[str, Any]:
    """Return what a run measured of the weights that it kept, on its validation images."""
    if run.kind == "soup":
        measures: Mapping[str, Any] = run.summary.measures
        return measures
    kept = run.summary.history.best() if run.kind in ("finetune", "purify") else None
    return {} if kept is None else kept.measures


def _unknown(summary: Any) -> list[Any]:
    return list(summary.measures.unknown.values())


def _curve(run: FinishedRun[Any]) -> Callable[[str], Markup] | None:
    if run.kind != "attack" or len(run.summary.per_eps) < 2 or run.summary.images.uncounted:
        return None
    from robustvlm.commands.attack.plots import curve_of, security_curve

    summary, name = run.summary, plain(run.name, 40)
    return lambda key: security_curve([curve_of(summary, name)], key=key, norm=norm_name(summary.norm))


def write_index(folder: Path, out: Path | None = None, found: Sequence[Entry] | None = None) -> Path:
    """Write the page over a folder of runs, by default to `index.html` in it, whole or not at all; return its path."""
    path = out or folder / "index.html"
    some = list(entries(folder) if found is None else found)
    shown = [entry for entry in some if entry.curve is not None][:_CURVES]
    with drawing(folder):
        curves = [(entry, entry.curve(f"curve{i}")) for i, entry in enumerate(shown) if entry.curve is not None]
        digest = b64encode(sha256(SORT.encode()).digest()).decode()
        text = page(
            "index.html.j2",
            title=folder.resolve().name or "Runs",
            runs=[entry for entry in some if not entry.fault],
            broken=[entry for entry in some if entry.fault],
            curves=curves,
            place=path.parent,
            script=Markup(SORT),
            digest=digest,
        )
    write_page(path, text)
    return path


def batch_of(folders: Sequence[Path], conditions: Sequence[str] = ()) -> Batch:
    """Return what is said of runs, each given by its folder or in a folder of runs, with a comparison of attack runs.

    Runs in a folder that cannot be read are left out with the reason; one that is named itself is an error.

    Args:
        conditions: as --fail-if has them, each put to the runs of the commands that know it.

    Raises:
        UserError: a run cannot be read or has no report, or a condition is one of no run.
    """
    named: list[FinishedRun[Any]] = []
    left_out: list[LeftOut] = []
    for folder in folders:
        if not holds_runs(folder):
            named.append(open_run(folder))
            continue
        for path in _runs(folder):
            try:
                named.append(open_run(path))
            except UserError as error:
                left_out.append(LeftOut(path, one_line(error, limit=300)))
    told: list[Told] = []
    gates = _gates(named, conditions)
    for run in named:
        with drawing(run.folder):
            report = report_of(run)
        if report is not None:
            told.append(Told(run, report, gates[run.folder]))
        elif run.folder in folders:
            raise UserError(f"cannot report on '{run.folder}': a run of kind {run.kind!r} has no report")
        else:
            left_out.append(LeftOut(run.folder, f"a run of kind {run.kind!r} has no report", fault=False))
    return Batch(told, _comparison(folders, named), left_out)


def _comparison(folders: Sequence[Path], named: Sequence[FinishedRun[Any]]) -> Report | None:
    """Return the comparison of runs named one by one: attacks, or an evaluation with attacks on its model."""
    if len(named) < 2 or len(folders) != len(named) or any(run.kind != "attack" for run in named[1:]):
        return None
    runs: Sequence[Any] = named
    if named[0].kind == "evaluate":
        from robustvlm.commands.evaluate.beside import beside_report

        return beside_report(runs[0], runs[1:])
    if named[0].kind != "attack":
        return None
    from robustvlm.commands.attack.compare import compare, comparison_report

    return comparison_report(runs, compare(*runs))


def _gates(runs: Sequence[FinishedRun[Any]], conditions: Sequence[str]) -> dict[Path, list[Gate]]:
    """Return the conditions by the folder of the run that they are put to; a gate that watches no run is a mistake."""
    found: dict[Path, list[Gate]] = {run.folder: [] for run in runs}
    once = {run.folder: run for run in runs}.values()
    for text in dict.fromkeys(conditions):
        known, refused = False, UserError(f"'{text}' was put to no run: none here has conditions")
        for run in once:
            parse = getattr(command_of(run.kind).load(), "parse_condition", None)
            try:
                condition = None if parse is None else parse(text)
            except UserError as error:
                condition, refused = None, error
            if condition is not None:
                found[run.folder].append(Gate(text, condition.holds(run.summary)))
                known = True
        if not known:
            raise refused
    return found

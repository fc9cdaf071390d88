"""`--track`: a finished run's numbers, curves and tables for TensorBoard, MLflow or Weights & Biases.

What is logged is read from the run's summary and report, the same for all three and for every command. Keys and
addresses are each package's own business, by its own environment variables: none of them is read or kept here.
"""

import math
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from robustvlm.errors import UserError, nearest
from robustvlm.report import sections as doc
from robustvlm.report.copies import escape_markdown, markdown, table_of, titles_of, words_of
from robustvlm.report.document import leaves, summary_of
from robustvlm.report.words import manifest_rows, plain
from robustvlm.runs.manifest import TRACKED, run_identity
from robustvlm.runs.run import FinishedRun
from robustvlm.text import one_line, secrets_cut

_MOST = 500
"""Numbers of a summary that are logged, the outermost first: a table of a thousand classes makes no curve."""
_NAMES = ("eps_text", "name", "spec", "unknown", "title", "goal")
_STAGES = {"steps": "training", "validations": "validation"}
_BARE = ("terms", "measures")  # words of the format that say nothing in a curve's name


@dataclass(frozen=True)
class Logged:
    """What is logged of a run.

    Args:
        ident: what the run is known by, the same when it is logged again.
        settings: what defines the run, as texts. numbers: of its summary. curves: values by step, by name.
        tables: those of its report, by title. text: its outcome in Markdown.
    """

    name: str
    kind: str
    folder: Path
    ident: str
    settings: Mapping[str, str]
    numbers: Mapping[str, float]
    curves: Mapping[str, list[tuple[int, float]]]
    tables: Mapping[str, doc.Table]
    text: str


def require(name: str) -> None:
    """Refuse a tracker that is not known, or whose package is missing or broken, before any work is done.

    Raises:
        UserError: naming the package and how it is installed.
    """
    if name not in TRACKERS:
        raise UserError(f"unknown --track '{name}': {nearest(name, TRACKERS)}")
    module, package, _ = TRACKERS[name]
    try:
        import_module(module)
    except ImportError as error:
        if error.name in (None, module):
            raise UserError(f"--track {name} needs the package {package}: pip install 'robustvlm[{name}]'") from None
        raise UserError(f"the package {package} cannot be used for --track {name}: {one_line(error)}") from error


def track(run: FinishedRun[Any], report: doc.Report | None, name: str) -> str:
    """Log a finished run, and return where it is; a run that was logged before is logged again in its place.

    Raises:
        UserError: the tracker failed; the run itself is whole.
    """
    require(name)
    try:
        return TRACKERS[name][2](logged(run, report))
    except Exception as error:  # whatever a network, a server or another's package does
        said = f"{type(error).__name__}: {one_line(error, limit=300)}"
        raise UserError(
            f"the run '{run.folder}' is whole, but {name} did not take it ({said}): repeat the command to log it again"
        ) from error


# What is logged, the same for every tracker


def logged(run: FinishedRun[Any], report: doc.Report | None) -> Logged:
    """Return what is logged of a run."""
    summary = summary_of(run)
    config = secrets_cut(run.manifest.get("config") or {})
    verdicts = [] if report is None else [words_of(line, 4000) for one in report.verdicts for line in one.lines]
    tables: dict[str, doc.Table] = {}
    for section in () if report is None else report.sections:
        for title, block in leaves(section.blocks):
            settings = isinstance(block, doc.Facts) and block.kind == "settings"
            if isinstance(block, doc.Table | doc.Facts | doc.Bars) and not settings:
                table = table_of(block)
                key = _unused(f"{plain(section.title)}: {title}" if title else plain(section.title), tables)
                tables[key] = table
    return Logged(
        name=plain(run.name, 120),
        kind=run.kind,
        folder=run.folder,
        ident=run_identity(run.manifest) or plain(run.name, 120),
        settings=dict(manifest_rows(config)),
        numbers=numbers_of(summary),
        curves=curves_of(summary),
        tables=tables,
        text="  \n".join(escape_markdown(verdict, 4000) for verdict in verdicts),
    )


def numbers_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary by their place in it, without its curves; of rates value and interval.

    Example:
        >>> numbers_of({"per_eps": [{"eps_text": "1/255", "asr": {"value": 0.5, "low": 0.1, "high": 0.9, "total": 2}}]})
        {'per_eps/1_255/asr': 0.5, 'per_eps/1_255/asr.low': 0.1, 'per_eps/1_255/asr.high': 0.9}
    """
    found: dict[str, float] = {}
    for place, number in sorted(_numbers(summary, ()), key=lambda one: len(one[0])):
        if len(found) < _MOST:
            found[_unused("/".join(place), found)] = number
    return found


def curves_of(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a summary: whatever stands in it as a history, by what changes along it.

    Example:
        >>> steps = [{"step": 5, "terms": {"loss": 2.0}}, {"step": 9, "terms": {"loss": 1.0}}]
        >>> curves_of({"history": {"steps": steps}})
        {'training/loss': [(5, 2.0), (9, 1.0)]}
    """
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for place, history in _histories(summary, ()):
        parts = history.items() if isinstance(history, Mapping) else [("", history)]
        for stage, items in parts:
            if not isinstance(items, list):
                continue
            for number, item in enumerate(items, start=1):
                if not isinstance(item, Mapping):
                    continue
                step = item.get("step", item.get("epoch", number))
                before = (*place, _STAGES.get(stage, stage)) if stage else place or ("training",)
                for name, value in _numbers({k: v for k, v in item.items() if k not in ("step", "epoch")}, ()):
                    curves["/".join((*before, *(word for word in name if word not in _BARE)))].append((step, value))
    return dict(curves)


def _histories(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if key == "history":
            yield place, item
        else:
            yield from _histories(item, (*place, _word(key)))


def _numbers(value: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], float]]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        if math.isfinite(value):
            yield place, float(value)
    elif isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
        for end in ("value", "low", "high"):
            yield from _numbers(value[end], place if end == "value" else (*place[:-1], f"{place[-1]}.{end}"))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # Of a history its single numbers are told; what is a list in it is a curve.
            if key == "history":
                item = {k: v for k, v in item.items() if not isinstance(v, list)} if isinstance(item, Mapping) else None
            yield from _numbers(item, (*place, _word(key)))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, Mapping):
                names = [str(item[name]) for name in _NAMES if item.get(name)]
                # A kind of corruption is there once for each severity.
                level = f":{item['severity']}" if names and "severity" in item else ""
                rest = {key: one for key, one in item.items() if key != "severity" or not level}
                yield from _numbers(rest, (*place, _word(names[0] + level if names else number)))


def _word(key: object) -> str:
    """Return a key as all trackers take it: letters, digits, and few signs."""
    return re.sub(r"[^A-Za-z0-9_. -]+", "_", plain(key, 80)) or "_"


def _unused(name: str, taken: Mapping[str, object]) -> str:
    """Return a name that is not taken: no number stands in another's place."""
    return next(one for one in (name, *(f"{name} {n}" for n in range(2, len(taken) + 3))) if one not in taken)


# Who takes it


def _to_tensorboard(run: Logged) -> str:
    """Write events into the run's own folder; TensorBoard finds the runs below the folder that it is given."""
    writer_of = import_module("torch.utils.tensorboard").SummaryWriter
    folder = run.folder / TRACKED
    shutil.rmtree(folder, ignore_errors=True)
    writer = writer_of(str(folder))
    try:
        for name, points in run.curves.items():
            for step, value in points:
                writer.add_scalar(name, value, step)
        for name, value in run.numbers.items():
            writer.add_scalar(f"summary/{name}", value, 0)
        writer.add_text("settings", markdown(table_of(doc.Facts([*run.settings.items()]))))
        writer.add_text("outcome", run.text)
        for title, table in run.tables.items():
            writer.add_text(f"tables/{title}", markdown(table))
    finally:
        writer.close()
    return f"{folder}: tensorboard --logdir '{run.folder.parent}'"


_IDENT = "robustvlm.run"


def _to_mlflow(run: Logged) -> str:
    """Log to what MLFLOW_TRACKING_URI names, in the experiment MLFLOW_EXPERIMENT_NAME or "robustvlm"."""
    client = import_module("mlflow").MlflowClient()
    entities = import_module("mlflow.entities")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "robustvlm"
    experiment = client.get_experiment_by_name(name)
    number = client.create_experiment(name) if experiment is None else experiment.experiment_id
    known = client.search_runs([number], f"tags.`{_IDENT}` = '{run.ident}'", max_results=1)
    tags = {_IDENT: run.ident, "robustvlm.command": run.kind}
    ident = (known[0] if known else client.create_run(number, run_name=run.name, tags=tags)).info.run_id
    points = [(key, value, step) for key, curve in run.curves.items() for step, value in curve]
    points += [(f"summary/{key}", value, 0) for key, value in run.numbers.items()]
    now = int(1000 * time.time())
    metrics = [entities.Metric(key[:250], value, now, step) for key, value, step in points]
    for start in range(0, len(metrics), 1000):  # the most that a server takes at once
        client.log_batch(ident, metrics=metrics[start : start + 1000])
    settings = [entities.Param(key[:250], value[:500]) for key, value in run.settings.items()]
    for start in range(0, len(settings), 100):
        client.log_batch(ident, params=settings[start : start + 100])
    client.log_text(ident, run.text + "\n", "outcome.md")
    for number, (title, table) in enumerate(run.tables.items(), start=1):
        client.log_text(ident, markdown(table) + "\n", f"tables/{number:02d} {_word(title)}.md")
    client.set_terminated(ident)
    return f"MLflow, experiment {name}, run {ident}"


def _to_wandb(run: Logged) -> str:
    """Log to the project WANDB_PROJECT or "robustvlm"; with WANDB_MODE=offline to a folder.

    What wandb gathers by itself is switched off: the command line, git, the machine and the console may hold secrets.
    """
    wandb = import_module("wandb")
    settings = wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    project = os.environ.get("WANDB_PROJECT") or "robustvlm"
    made = wandb.init(
        project=project, name=run.name, id=run.ident[:32], resume="allow", job_type=run.kind,
        config=dict(run.settings), settings=settings,
    )  # fmt: skip
    try:
        by_step: dict[int, dict[str, float]] = defaultdict(dict)
        for name, points in run.curves.items():
            for step, value in points:
                by_step[step][name] = value
        for step, values in sorted(by_step.items()):
            made.log(values, step=step)
        made.summary.update(dict(run.numbers) | {"outcome": run.text})
        made.log({f"tables/{title}": wandb.Table(*_grid(table)) for title, table in run.tables.items()})
        address, folder = None if made.offline else made.url, Path(made.dir).parent
    finally:
        made.finish()
    return address or f"{folder}: wandb sync '{folder}'"


def _grid(table: doc.Table) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows as words; the headings of rows stand in a first column, where there are any."""
    parted, part, rows = any(isinstance(row, str) for row in table.rows), "", []
    for row in table.rows:
        if isinstance(row, str):
            part = plain(row)
        else:
            rows.append([*([part] if parted else []), *(words_of(cell) for cell in row)])
    titles: list[str] = []
    for title in [*(["Part"] if parted else []), *titles_of(table)]:
        titles.append(_unused(title, dict.fromkeys(titles)))
    return titles, rows


TRACKERS: dict[str, tuple[str, str, Callable[[Logged], str]]] = {
    "tensorboard": ("tensorboard", "tensorboard", _to_tensorboard),
    "mlflow": ("mlflow", "mlflow-skinny", _to_mlflow),
    "wandb": ("wandb", "wandb", _to_wandb),
}
"""Every tracker by its name on the command line: the module that it needs, its package, and what takes a run."""

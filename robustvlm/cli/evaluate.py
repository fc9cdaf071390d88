"""`robustvlm evaluate`: clean accuracy, calibration and superclass accuracy of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from robustvlm.cli.options import Classes, Device, Templates, TreeFile
from robustvlm.cli.terminal import say_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from robustvlm.evaluation.clean import CleanResult
    from robustvlm.report.sections import Block


def evaluate(
    model: Annotated[str, typer.Argument(help="The model; `robustvlm models` lists the forms.")] = "tiny",
    data: Annotated[str, typer.Option("--data", help="The images; `robustvlm data` lists the forms.")] = "emoji",
    classes: Classes = None,
    templates: Templates = None,
    tree: TreeFile = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Evaluate this many images, a fixed selection.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per pass.")] = 64,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Measure clean zero-shot accuracy with its 95 % interval, calibration error, and accuracy per tree level."""
    # Loading torch and open_clip takes seconds; --help and other commands should not wait for them.
    from robustvlm.cli.console import Console
    from robustvlm.data import open_data
    from robustvlm.defenses import load_classifier
    from robustvlm.evaluation.clean import evaluate_clean
    from robustvlm.report.screen import show

    source = open_data(data, classes=classes, templates=templates, tree=tree)
    classifier = load_classifier(model, source.class_names, source.templates, device=device)
    with _progress(quiet=as_json) as progress:
        ids = source.ids()
        total = limit if ids is None else min(len(ids), limit or len(ids))
        task = progress.add_task("Evaluating", total=total)
        result = evaluate_clean(
            classifier,
            source,
            limit=limit,
            batch_size=batch_size,
            on_images=lambda done: progress.update(task, completed=done),
        )
    if as_json:
        say_json(result.model_dump_json(indent=2))
    else:
        show(Console(), _blocks(result))


def _progress(*, quiet: bool) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from robustvlm.cli.console import Console

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _blocks(result: CleanResult) -> list[Block]:
    """Return what is said of a clean evaluation: every measure with its interval."""
    from robustvlm.report.sections import Column, Measure, Row, Table, Text
    from robustvlm.report.wording import percent

    several = len({at.tree for at in result.superclass_accuracy}) > 1
    rows: list[Row] = [(f"accuracy, {result.classes:,} classes", Measure.of(result.accuracy))]
    for at in result.superclass_accuracy:
        where = f"{at.tree}, level {at.level}" if several else f"level {at.level}"
        label = f"superclass accuracy, {where} ({at.superclasses:,} groups)"
        rows.append((label, Measure.of(at.accuracy)))
    for what, rate in (("known", result.rejected), ("unknown", result.unknown_rejected)):
        if rate is not None:
            rows.append((f"rejected, images of {what} classes", Measure.of(rate)))
    rows.append(("mean confidence", percent(result.mean_confidence)))
    rows.append(("calibration error (15 bins)", percent(result.calibration_error)))
    title = f"{result.model} on {result.data}"
    table = Table([Column("Measure"), Column("Value, 95% interval")], rows, title=title, strong=frozenset({0}))
    return [table, *map(Text, _notes(result))]


def _notes(result: CleanResult) -> Iterator[str]:
    speed = f"{result.images_per_second:,.0f} images/s"
    yield f"{result.images:,} images in {result.seconds:.1f} s ({speed}); {result.accuracy.method} intervals"
    if result.unknown and result.unknown_rejected is None:
        yield f"{result.unknown:,} images of unknown classes are left out"
    yield from (f"Note: {remark}" for remark in result.remarks)
    if result.unreadable:
        name, reason = result.unreadable_reasons[0]
        yield f"{result.unreadable:,} images could not be read; the first, {name}: {reason}"

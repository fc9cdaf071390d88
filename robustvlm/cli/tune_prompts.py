"""`robustvlm tune-prompts`: prompts learnt from a few images a class, the encoders untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.closing import given_command, say_remarks
from robustvlm.cli.options import Classes, Device, Fresh, Out, RecordAsJson, RunName
from robustvlm.cli.terminal import say_json
from robustvlm.core.foreign_text import without_secrets

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.evaluation.prompt_tuning import PreparedPrompts


def tune_prompts(
    model: Annotated[str, typer.Argument(help="An open_clip model or a folder on one; it stays as it is.")] = "tiny",
    data: Annotated[
        str, typer.Option(help="Labelled images to learn from; `robustvlm data` lists the forms.")
    ] = "emoji?split=train&copies=1",
    classes: Classes = None,
    val: Annotated[
        str | None, typer.Option(help="Images of the same classes to measure on, another style say.")
    ] = None,
    ood: Annotated[
        list[str] | None, typer.Option(help="Unknown images to tell from those of --val; may be repeated.")
    ] = None,
    shots: Annotated[int, typer.Option(help="Images of each class to learn from; 0 for all.", min=0)] = 16,
    context: Annotated[int, typer.Option(help="Number of context vectors (M).")] = 4,
    start: Annotated[str, typer.Option(help="Words that the context begins as.")] = "a picture of a",
    epochs: Annotated[int, typer.Option(help="Passes over the features.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Features per step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate (Adam, cosine).")] = 0.01,
    lambda_ebm: Annotated[float, typer.Option("--lambda-ebm", help="Weight of the energy term.")] = 10.0,
    ebm: Annotated[bool, typer.Option("--ebm/--no-ebm", help="With the EBM terms, or CoOp without them.")] = True,
    c: Annotated[int, typer.Option("--c", help="Largest cosines that the energy change as a score resets.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: RunName = None,
    fresh: Fresh = False,
    as_json: RecordAsJson = False,
) -> None:
    """Learn context vectors in front of the class names from a few images a class; the run's folder is a model spec."""
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.cli.console import Console
    from robustvlm.evaluation.prompt_tuning import prepare_prompts
    from robustvlm.runs.prompt_config import PromptConfig

    config = PromptConfig(
        model=model,
        data=data,
        classes=None if classes is None else str(classes),
        val=val,
        ood=ood or [],
        shots=shots or None,
        context=context,
        start=start,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        energy_weight=lambda_ebm if ebm else None,
        n_reset=c,
        seed=seed,
        device=device,
    )
    prepared = prepare_prompts(config, out=out, name=name, command=given_command())
    record = _work(prepared, Console(stderr=True), fresh=fresh, quiet=as_json)
    if as_json:
        say_json(json.dumps(record, indent=2))
    else:
        _show(record, prepared, Console())


def _work(prepared: PreparedPrompts, console: Console, *, fresh: bool, quiet: bool) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    say_remarks(console, prepared.manifest)
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        encoding = progress.add_task("Encoding", total=None, loss="")
        tuning = progress.add_task("Tuning", total=prepared.config.epochs, loss="")
        return prepared.run(
            fresh=fresh,
            on_images=lambda done: progress.update(encoding, completed=done),
            on_epoch=lambda epoch, terms: progress.update(tuning, completed=epoch, loss=f"loss {terms['loss']:.3f}"),
        )


def _show(record: dict[str, Any], prepared: PreparedPrompts, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    loss = record["history"][-1]["loss"]
    console.print(Text(f"{record['images']:,} images, loss {loss:.3f} in the last epoch"), soft_wrap=True)
    if "tuned" in record:
        table = Table()
        for heading in ("measure", "hand-written prompts", "tuned"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        table.add_row("accuracy", *(_rate(record[key]["accuracy"]) for key in ("zero_shot", "tuned")))
        for spec in map(without_secrets, prepared.config.ood):
            cells = (_interval(record[key]["auroc"][spec]) for key in ("zero_shot", "tuned"))
            table.add_row(Text(f"AUROC of the energy change, {spec}"), *cells)
        console.print(table)
        console.print(Text(f"on {prepared.config.val}; 95 % intervals"), soft_wrap=True)
    for note in record.get("notes", []):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(Text(f"model: {prepared.folder.path}"), soft_wrap=True)


def _rate(found: dict[str, Any]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} - {found['high']:.1%})"


def _interval(found: list[float]) -> str:
    value, low, high = found
    return f"{value:.3f} ({low:.3f} - {high:.3f})"

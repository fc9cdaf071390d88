"""`robustvlm purify`: a purifier and a mapper around a frozen encoder, for a stronger smoothed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.closing import given_command, say_remarks
from robustvlm.cli.options import Device, Out, RecordAsJson, Resume, RunName
from robustvlm.cli.terminal import say_json
from robustvlm.core.ranks import current_ranks

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.evaluation.purifying.run import PreparedPurify
    from robustvlm.runs.training_summary import TrainingSummary

_MODEL = "The encoder, which stays as it is; `robustvlm models` lists the forms. Not a smoothed one."
_DENOISER = "Your own denoiser in the purifier's place, as module:callable (see docs/purify.md)."


def purify(
    model: Annotated[str, typer.Argument(help=_MODEL)] = "tiny",
    data: Annotated[
        str, typer.Option(help="Images to train on, without labels; `robustvlm data` lists the forms.")
    ] = "emoji?split=train",
    val: Annotated[
        str | None, typer.Option(help="Images to watch the score on [default: a part of the data, held out].")
    ] = None,
    val_limit: Annotated[int, typer.Option(help="Watch the score on at most this many images.")] = 64,
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="Noise level to serve, in [0, 1] pixels; may be repeated [default: 0.12, 0.25 and 0.5]."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="purifier or mapper [default: first one, then the other].")] = None,
    denoiser: Annotated[str | None, typer.Option(help=_DENOISER)] = None,
    size: Annotated[str, typer.Option(help="Of the purifier: tiny, small or base.")] = "tiny",
    steps: Annotated[int, typer.Option(help="Optimiser steps of the purifier.")] = 1000,
    mapper_steps: Annotated[int, typer.Option(help="Optimiser steps of the mapper.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes.")] = 64,
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is cut into, to save memory.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the purifier.")] = 5e-3,
    mapper_lr: Annotated[float, typer.Option(help="Peak learning rate of the mapper.")] = 2e-3,
    feature_weight: Annotated[float, typer.Option(help="Of 1 - cos to the clean feature (purifier).")] = 2.0,
    pixel_weight: Annotated[float, typer.Option(help="Of the squared error of the pixels (purifier).")] = 1.0,
    diffusion_weight: Annotated[float, typer.Option(help="Of the denoising loss (purifier).")] = 1.0,
    statistics_weight: Annotated[float, typer.Option(help="Of the match of mean and spread (mapper).")] = 1.0,
    augment: Annotated[str, typer.Option(help="none, flip, crop (and flip) or strong (colours too).")] = "crop",
    ema: Annotated[float, typer.Option(help="Decay of the moving average of the weights, which is kept.")] = 0.99,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (weights and noise stay fp32).")] = "fp32",
    limit: Annotated[int | None, typer.Option(help="Use this many images, chosen by a hash of their ids.")] = None,
    validate_every: Annotated[
        float, typer.Option(help="In steps; below 1, a share of all; 0: at the end only.")
    ] = 0.25,
    checkpoint_every: Annotated[int, typer.Option(help="In steps [default: every five minutes].")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: RunName = None,
    resume: Resume = None,
    as_json: RecordAsJson = False,
) -> None:
    """Train a purifier before and a mapper behind a frozen encoder; the run's folder is a model spec, RUN+smooth:0.25.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same weights. Under
    torchrun several processes share every batch.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.cli.console import Console
    from robustvlm.evaluation.purifying.setup import prepare_purify
    from robustvlm.runs.purify_config import PurifyConfig

    config = PurifyConfig(
        model=model,
        data=data,
        val=val,
        val_limit=val_limit,
        sigma=sigma or PurifyConfig.model_fields["sigma"].default,
        only=only,
        denoiser=denoiser,
        size=size,
        steps=steps,
        mapper_steps=mapper_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        mapper_lr=mapper_lr,
        feature_weight=feature_weight,
        pixel_weight=pixel_weight,
        diffusion_weight=diffusion_weight,
        statistics_weight=statistics_weight,
        augment=augment,
        ema=ema,
        precision=precision,
        limit=limit,
        validate_every=validate_every,
        seed=seed,
        device=device,
    )
    console = Console(stderr=as_json, quiet=not current_ranks().leader)
    command = given_command()
    prepared = prepare_purify(config, out=out, name=name, command=command, checkpoint_every=checkpoint_every)
    summary = _work(prepared, console, {"fresh": resume is False, "resume": resume is True})
    if current_ranks().leader:
        _show(summary, prepared, console, as_json=as_json)


def _work(prepared: PreparedPurify, console: Console, settings: dict[str, Any]) -> TrainingSummary:
    from rich.markup import escape

    from robustvlm.cli.training_progress import shown_training
    from robustvlm.defenses.purify.train import Stage
    from robustvlm.training import TrainingObserver

    what = f"Purifying [bold]{escape(prepared.encoder.spec)}[/bold]"
    say_remarks(console, prepared.manifest)
    with shown_training(console, what, prepared.folder.path) as progress:

        def observe(stage: Stage) -> TrainingObserver:
            console.print(f"The {stage}:")
            return progress

        return prepared.run(observe, **settings)


def _show(summary: TrainingSummary, prepared: PreparedPurify, console: Console, *, as_json: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from robustvlm.report.training_html import measure_rows

    if as_json:
        say_json(summary.model_dump_json(indent=2))
        return
    table = Table(title="Gaussian robustness score, images held out")
    for column in ("noise", "encoder alone", "this model"):
        table.add_column(column, justify="left" if column == "noise" else "right")
    for measure, *values in measure_rows(summary.history):
        table.add_row(measure.removeprefix("score at "), *map(escape, values))
    console.print(table)
    folder, middle = str(prepared.folder.path), summary.best_by or ""
    console.print(
        f"Model:  {escape(folder)}, to be smoothed: {escape(folder)}+smooth:{middle.removeprefix('score at ')}"
    )
    console.print(f"Report: {escape(str(prepared.folder.report_path))}", soft_wrap=True)

"""`robustvlm finetune`: adversarial fine-tuning of a model's vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustvlm.cli.options import (
    Classes,
    Device,
    Out,
    RecordAsJson,
    Resume,
    RunName,
    Templates,
    given_command,
    one_radius,
    say_remarks,
)
from robustvlm.cli.terminal import say_json
from robustvlm.core.ranks import current_ranks

if TYPE_CHECKING:
    from robustvlm.cli.console import Console
    from robustvlm.commands.finetune.work import PreparedFinetune
    from robustvlm.report.training import TrainingSummary

_METHOD = (
    "hierarchical (needs a class tree), tecoa, fare, pmg, simclip, or clean (the control: no attack). fare and simclip "
    "read no labels."
)
_TREE = (
    "File of a class tree (JSON, YAML or CSV), wordnet, or llm (by the language model of --llm); repeat it for a "
    "forest [default: the data's own]."
)
_OPTION = (
    "An option of the method, NAME=VALUE; may be repeated. hierarchical: depth, temperature, negatives, leaf_only, "
    "per_level, eps_text, vicinity, vicinity_radius, norm_order, norm_gap, train_texts; pmg: general, clean, reverse."
)


def finetune(
    model: Annotated[str, typer.Argument(help="The model to start from; `robustvlm models` lists the forms.")] = "tiny",
    method: Annotated[str, typer.Option(help=_METHOD)] = "hierarchical",
    data: Annotated[
        str, typer.Option(help="Images to train on; `robustvlm data` lists the forms.")
    ] = "emoji?split=train",
    val: Annotated[
        str | None, typer.Option(help="Images to validate on [default: a tenth of the data, at most 512, held out].")
    ] = None,
    classes: Classes = None,
    templates: Templates = None,
    tree: Annotated[list[str] | None, typer.Option(help=_TREE)] = None,
    tree_by: Annotated[
        list[str] | None,
        typer.Option(help="What --tree llm sorts by, repeatable [default: kind of thing]."),
    ] = None,
    llm: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint for --tree llm.")] = None,
    llm_model: Annotated[str | None, typer.Option(help="The language model there.")] = None,
    norm: Annotated[str, typer.Option(help="Linf or L2, of the inner attack and of validations.")] = "Linf",
    eps: Annotated[str, typer.Option(help="Radius, of the inner attack and of validations.")] = "1/255",
    alpha: Annotated[
        str | None, typer.Option(help="Step of the inner attack [default: 2.5 eps / (steps + 1)].")
    ] = None,
    inner_steps: Annotated[int, typer.Option(help="Gradient steps of the inner attack.")] = 3,
    curvature: Annotated[
        float | None, typer.Option(help="Of the hyperbolic space (hierarchical) [default: 1].")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help=_OPTION)] = None,
    trainable: Annotated[
        str, typer.Option(help="all (the vision tower), lora, lora:RANK, ssf, or last:N (its last N blocks).")
    ] = "all",
    augment: Annotated[str, typer.Option(help="none, flip, crop (and flip) or strong (colours too).")] = "crop",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps [default: 2 epochs].")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the images, in place of steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step, over all processes.")] = 128,
    accumulate: Annotated[int, typer.Option(help="Parts that a batch is cut into, to save memory.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate [default: 1e-5; lora and ssf: 1e-3].")] = None,
    warmup: Annotated[float, typer.Option(help="Steps of warm-up; below 1, a share of all steps.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of matrices and filters.")] = 1e-4,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (weights and perturbations stay fp32).")] = "fp32",
    ema: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights, which is then kept, such as 0.999.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the vision tower (torch.compile).")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade time for memory, where the tower offers it.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use this many images, chosen by a hash of their ids.")] = None,
    val_limit: Annotated[int, typer.Option(help="Validate on at most this many images.")] = 512,
    val_steps: Annotated[int, typer.Option(help="PGD steps of a validation.")] = 10,
    validate_every: Annotated[float, typer.Option(help="In steps; below 1, a share of all; 0: at the end only.")] = 0.1,
    checkpoint_every: Annotated[int, typer.Option(help="In steps [default: every five minutes].")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: RunName = None,
    resume: Resume = None,
    as_json: RecordAsJson = False,
) -> None:
    """Fine-tune a model so that it withstands attacks; the run's folder is a model spec.

    Stopped or killed at any moment, the same command goes on where it was and ends with the same weights. Under
    torchrun several processes share every batch.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from robustvlm.attacks import parse_norm
    from robustvlm.cli.console import Console
    from robustvlm.commands.finetune.work import FinetuneConfig, parse_options, prepare_finetune

    eps_text, radius = one_radius(eps, "--eps")
    options = [*([] if curvature is None else [f"curvature={curvature}"]), *(option or [])]
    config = FinetuneConfig(
        model=model,
        data=data,
        val=val,
        classes=None if classes is None else str(classes),
        templates=None if templates is None else str(templates),
        trees=tree or [],
        tree_by=tree_by or [],
        llm=llm,
        llm_model=llm_model,
        method=method,
        options=parse_options(method, options),
        norm=parse_norm(norm),
        eps=radius,
        eps_text=eps_text,
        alpha=None if alpha is None else one_radius(alpha, "--alpha")[1],
        inner_steps=inner_steps,
        trainable=trainable,
        augment=augment,
        limit=limit,
        val_limit=val_limit,
        val_steps=val_steps,
        steps=steps,
        epochs=2.0 if steps is None and epochs is None else epochs,
        batch_size=batch_size,
        lr=lr if lr is not None else 1e-3 if trainable.startswith(("lora", "ssf")) else 1e-5,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        precision=precision,
        ema=ema,
        compile=compiled,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        validate_every=validate_every,
        device=device,
    )
    console = Console(stderr=as_json, quiet=not current_ranks().leader)
    command = given_command()
    prepared = prepare_finetune(config, out=out, name=name, command=command, checkpoint_every=checkpoint_every)
    summary = _work(prepared, console, {"fresh": resume is False, "resume": resume is True})
    if current_ranks().leader:
        _show(summary, prepared, console, as_json=as_json)


def _work(prepared: PreparedFinetune, console: Console, settings: dict[str, Any]) -> TrainingSummary:
    from rich.markup import escape

    from robustvlm.cli.progress import shown_training

    what = f"Fine-tuning [bold]{escape(prepared.vlm.spec)}[/bold] ({prepared.config.method})"
    say_remarks(console, prepared.manifest)
    with shown_training(console, what, prepared.folder.path) as progress:
        return prepared.run(progress, **settings)


def _show(summary: TrainingSummary, prepared: PreparedFinetune, console: Console, *, as_json: bool) -> None:
    from robustvlm.report.screen import show
    from robustvlm.report.training import TrainingRun, training_closing, training_report

    if as_json:
        say_json(summary.model_dump_json(indent=2))
        return
    run = TrainingRun(prepared.folder.path, prepared.manifest, summary)
    show(console, training_report(run), training_closing(run))

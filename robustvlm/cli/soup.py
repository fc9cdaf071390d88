"""`robustvlm soup`: the average of several fine-tuned models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustvlm.cli.closing import given_command
from robustvlm.cli.options import Classes, Device, Out, Templates, one_radius, require_none
from robustvlm.cli.terminal import say, say_json

if TYPE_CHECKING:
    from robustvlm.evaluation.finetuning.souping import Soup


def soup(
    models: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or specs, of one architecture.")],
    method: Annotated[
        str, typer.Option(help="uniform (the mean of all), or greedy (each stays only if it does not harm).")
    ] = "uniform",
    val: Annotated[str | None, typer.Option(help="Images to choose by and to measure on; greedy needs them.")] = None,
    by: Annotated[str, typer.Option(help="What greedy goes by: robust or clean accuracy.")] = "robust",
    classes: Classes = None,
    templates: Templates = None,
    norm: Annotated[str, typer.Option(help="Linf or L2, of the attack that measures.")] = "Linf",
    eps: Annotated[str, typer.Option(help="Its radius.")] = "1/255",
    val_steps: Annotated[int, typer.Option(min=1, help="Its PGD steps.")] = 10,
    limit: Annotated[int, typer.Option(min=1, help="Measure on at most this many images.")] = 512,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the run [default: made from the settings].")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Average the weights of models that were fine-tuned from one; the run's folder is a model spec."""
    from robustvlm.attacks import parse_norm
    from robustvlm.evaluation.finetuning.souping import make_soup
    from robustvlm.runs.soup_config import SoupConfig

    if val is None:
        require_none({"--classes": classes, "--templates": templates}, "is for --val, and there is none")
    eps_text, radius = one_radius(eps, "--eps")
    config = SoupConfig(
        model=models[0],
        models=models,
        method=method,
        by=by,
        data=val,
        classes=None if classes is None else str(classes),
        templates=None if templates is None else str(templates),
        norm=parse_norm(norm),
        eps=radius,
        eps_text=eps_text,
        val_steps=val_steps,
        limit=limit,
        device=device,
    )
    command = given_command()
    found, folder = make_soup(config, out=out, name=name, command=command, fresh=fresh)
    if as_json:
        say_json(found.model_dump_json(indent=2))
        return
    _show(found)
    say(f"Model: {folder.path}")


def _show(found: Soup) -> None:
    from robustvlm.stats import Rate

    for step in found.tasted:
        value = f" {step.value:.1%}" if found.method == "greedy" else ""
        say(f"{'+' if step.kept else '-'} {step.name}{value}")
    for name, measure in found.measures.items():
        if isinstance(measure, Rate) and measure.value is not None:
            say(f"{name}: {measure.value:.1%} ({measure.low:.1%}-{measure.high:.1%})")

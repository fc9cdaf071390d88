"""`robustvlm build`: a whole pipeline from runs, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustvlm.cli.closing import given_command
from robustvlm.cli.options import Device, Out
from robustvlm.core.ranks import current_ranks


def build(
    encoder: Annotated[
        str, typer.Option(help="The encoder: any model without operators, such as the run of a fine-tuning.")
    ] = "tiny",
    purify: Annotated[str | None, typer.Option(help="A run of `robustvlm purify`: purifier and mapper.")] = None,
    smooth: Annotated[str | None, typer.Option(help="Noise level and samples, SIGMA[:N0], as 0.25:64.")] = None,
    immunize: Annotated[
        str | None, typer.Option(help="A run of `robustvlm immunize`: adapter, head and thresholds.")
    ] = None,
    accept_misfits: Annotated[
        bool, typer.Option("--accept-misfits", help="Put parts together that were made for other models.")
    ] = False,
    device: Device = "auto",
    out: Out = Path("runs"),
    name: Annotated[str | None, typer.Option(help="Name of the pipeline [default: made from the settings].")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier pipeline of that name.")] = False,
) -> None:
    """Put a pipeline together: purifier, encoder, mapper, smoothing, immunised head; its folder is a model spec.

    The parts are copied, so that the folder can be moved and the runs deleted. Each part is checked against the model
    that it was made for.
    """
    # The heavy libraries are loaded here, so that --help and --version answer at once.
    from rich.markup import escape

    from robustvlm.cli.console import Console
    from robustvlm.defenses.build import Recipe
    from robustvlm.errors import UserError
    from robustvlm.evaluation.assembling import assemble

    if current_ranks().size > 1:
        raise UserError("`robustvlm build` is one process's work: start it without torchrun")
    recipe = Recipe(encoder=encoder, purify=purify, smooth=smooth, immunize=immunize)
    console = Console()
    command = given_command()
    with console.status("Copying the parts") if console.is_terminal else _Quiet():
        built = assemble(
            recipe,
            out=out,
            name=name,
            command=command,
            accept_misfits=accept_misfits,
            device=device,
            fresh=fresh,
        )
    for wrong in built.misfits:
        console.print(f"[bold]Warning[/bold]: {escape(str(wrong))}", highlight=False)
    console.print(f"Parts:  {escape(' > '.join(built.parts))}", highlight=False)
    console.print(f"Model:  {escape(str(built.folder))}", soft_wrap=True)


class _Quiet:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None

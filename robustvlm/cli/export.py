"""`robustvlm export`: a model as a folder that open_clip reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustvlm.cli.terminal import say


def export(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or any other open_clip model's spec.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")],
    half: Annotated[bool, typer.Option("--half", help="Store weights with 16 bits.")] = False,
) -> None:
    """Write a fine-tuned or averaged model as an open_clip folder: config, weights (safetensors), tokenizer.

    open_clip loads it with create_model("local-dir:OUT"), and robustvlm with OUT as the model.
    """
    # Loading torch and open_clip takes seconds; --help should not wait for them.
    from robustvlm.evaluation.finetuning.exporting import export_model

    export_model(model, out, half=half)
    say(f"Model: {out}")
    say(f"open_clip: create_model('local-dir:{out}'), get_tokenizer('local-dir:{out}')")

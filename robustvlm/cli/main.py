"""The `robustvlm` program: its commands, and what every failure looks like to the user."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from robustvlm import __version__
from robustvlm.cli.attack import attack
from robustvlm.cli.build import build
from robustvlm.cli.certify import certify
from robustvlm.cli.data import data
from robustvlm.cli.detect import detect
from robustvlm.cli.evaluate import evaluate
from robustvlm.cli.export import export
from robustvlm.cli.finetune import finetune
from robustvlm.cli.immunize import immunize
from robustvlm.cli.models import models
from robustvlm.cli.purify import purify
from robustvlm.cli.report import report
from robustvlm.cli.soup import soup
from robustvlm.cli.tune_prompts import tune_prompts
from robustvlm.core.memory import is_out_of_memory
from robustvlm.core.ranks import current_ranks
from robustvlm.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="robustvlm",
    help="Tell whether a CLIP-like vision-language model can be trusted when somebody attacks it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    attack,
    certify,
    evaluate,
    detect,
    finetune,
    soup,
    immunize,
    tune_prompts,
    export,
    purify,
    build,
    report,
    models,
    data,
):
    app.command(command.__name__.replace("_", "-"))(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"robustvlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tell whether a CLIP-like vision-language model can be trusted when somebody attacks it."""
    del version


def main() -> NoReturn:
    """Run the program; a user's mistake ends in one line on standard error and exit code 2, Ctrl-C in 130."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Threads that spin while they wait cost a busy machine several times what they save; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The C++ stack traces by which torch tells that a connection of several processes is lost; we say it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); what is left to say has no listener.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        code = _complain_of(error)
    sys.exit(code if isinstance(code, int) else 0)


def _complain_of(error: Exception) -> int:
    """Put click's errors, exhausted memory and the system's refusals into one line; the rest are our bugs."""
    explain, exit_code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if callable(explain) and isinstance(exit_code, int):
        return _complain_of_usage(error, str(explain()), exit_code)
    if type(error).__name__ == "Abort":
        return _complain("interrupted", INTERRUPTED)
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return _complain("memory ran out even for one image at a time: use a smaller model or --device cpu", 2)
    if isinstance(error, OSError) and error.strerror:
        return _complain(error.strerror + (f": '{error.filename}'" if error.filename else ""), 2)
    _first_to_fail(f"{type(error).__name__}: {error}")
    raise error


def _complain_of_usage(error: Exception, message: str, exit_code: int) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # no mistake: its message is the help
        print(message)
        return exit_code
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return _complain(message.rstrip(".") + hint, exit_code)


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    if _first_to_fail(line):
        print(f"error: {line}" if code != INTERRUPTED else line, file=sys.stderr)
    return code


def _first_to_fail(message: str) -> bool:
    """Let the other processes of a torchrun job know, and return whether this one is to tell the user."""
    try:
        return current_ranks().fail(message)
    except UserError:  # no connection to the others: each speaks for itself
        return True


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

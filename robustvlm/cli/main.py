"""The `robustvlm` program: its commands, and what every failure looks like to the user."""

import copy
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, NoReturn, get_args

import typer
from rich.markup import escape

from robustvlm import __version__
from robustvlm.cli import terminal
from robustvlm.cli.acts import certify_or_audit, predict_and_show, report
from robustvlm.cli.app import check_given, typer_command
from robustvlm.cli.help import HelpfulCommand, group_of
from robustvlm.cli.inspect import data, export, models
from robustvlm.commands.assemble import BUILD
from robustvlm.commands.attack import ATTACK
from robustvlm.commands.certify import CERTIFY
from robustvlm.commands.detect import DETECT
from robustvlm.commands.evaluate import EVALUATE
from robustvlm.commands.finetune import FINETUNE
from robustvlm.commands.immunize import IMMUNIZE
from robustvlm.commands.judge import JUDGE
from robustvlm.commands.predict import PREDICT
from robustvlm.commands.prompts import TUNE_PROMPTS
from robustvlm.commands.purify import PURIFY
from robustvlm.commands.soup import SOUP
from robustvlm.core.loading import telling
from robustvlm.core.user_code import NO_CODE, code_policy

_NoCode = Annotated[
    bool,
    typer.Option(
        "--no-code",
        help=f"Refuse to import code: module:callable, given or named by a file (also {NO_CODE}=1).",
        rich_help_panel="Run",
    ),
]


def _as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return an option whose help shows what stands in square brackets, which the drawn page would take for markup."""
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.help = escape(info.help or "")
    return parameter.replace(annotation=Annotated[kind, info])


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the option that all have; whatever it raises goes past the command-line library."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("no_code", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_NoCode)
    parameters = [*signature.parameters.values(), option]
    signature = signature.replace(parameters=[_as_written(parameter) for parameter in parameters])

    @functools.wraps(command)
    def run(*arguments: Any, no_code: bool, **options: Any) -> None:
        try:
            if sys.argv[1:2] == [command.__name__.replace("_", "-")]:
                check_given(sys.argv[2:], signature.parameters)
            with code_policy(refused=no_code, given=sys.argv[1:]), telling(terminal.Prompts()):
                command(*arguments, **options)
        except BaseException as error:
            raise terminal.Ended(error) from error

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return run


app = typer.Typer(
    name="robustvlm",
    help="Tell whether a CLIP-like vision-language model can be trusted when somebody attacks it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    typer_command(ATTACK),
    typer_command(CERTIFY, act=certify_or_audit),
    typer_command(EVALUATE),
    typer_command(PREDICT, predict_and_show),
    typer_command(DETECT),
    typer_command(JUDGE),
    typer_command(FINETUNE),
    typer_command(SOUP),
    typer_command(IMMUNIZE),
    typer_command(TUNE_PROMPTS),
    export,
    typer_command(PURIFY),
    typer_command(BUILD),
    report,
    models,
    data,
):
    name = command.__name__.replace("_", "-")
    app.command(name, cls=HelpfulCommand, rich_help_panel=group_of(name))(_guarded(command))


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
    terminal.open_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    # Threads that spin while they wait cost a busy machine several times what they save; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The C++ stack traces by which torch tells that a connection of several processes is lost; we say it in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with terminal.notes_shown():
            code = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output went away (`| head`); what is left to say has no listener.
        terminal.drop_output()
        code = terminal.BROKEN_PIPE
    except KeyboardInterrupt:
        code = terminal.INTERRUPTED
    except OSError as error:
        terminal.drop_output()
        code = terminal.explain(error)
    sys.exit(code)


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except SystemExit as error:  # not from a command, but from the command-line library
        if not error.code:  # it has completed a word for the shell, or installed the completion
            return 0
        raise BrokenPipeError from error  # it could not print the help
    except BaseException as error:
        return terminal.explain(error)
    if (
        code == terminal.INTERRUPTED
    ):  # not from a command: the command-line library was interrupted while it read the options
        return terminal.complain("interrupted", terminal.INTERRUPTED)
    return code if isinstance(code, int) else 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

"""Commands of the command line made from their settings: what is typed, what is said meanwhile, how they end."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from pydantic.fields import FieldInfo

from robustvlm.cli.options import end_if_any_holds, given_command, interruptible, say_remarks
from robustvlm.cli.terminal import say_json
from robustvlm.core.ranks import current_ranks
from robustvlm.runs.run import Command, FinishedRun, Run
from robustvlm.runs.settings import Option, Settings, flags_of, repeatable

if TYPE_CHECKING:
    from robustvlm.cli.console import Console

Act = Callable[[Command, Settings], None]


def typer_command(command: Command, act: Act | None = None) -> Callable[..., None]:
    """Return a function whose signature Typer reads: a parameter for every option of the settings, in their order.

    Args:
        act: what is done with the settings; by default `start_and_show`.
    """
    declared = command.settings
    hints = get_type_hints(declared)
    parameters = [_parameter(name, field, about, hints[name]) for name, field, about in declared.options()]

    def run(**values: Any) -> None:
        # What was not given is None, or the default itself: the settings know their own.
        given = {name: value for name, value in values.items() if value is not None}
        (act or start_and_show)(command, declared(**given))

    run.__name__ = command.name.replace("-", "_")
    run.__doc__ = inspect.cleandoc(declared.__doc__ or "")
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, field: FieldInfo, about: Option, kind: Any) -> inspect.Parameter:
    kind, default = about.typed or kind, field.get_default()
    if field.is_required():
        default = inspect.Parameter.empty
    elif repeatable(field) or not about.shown:
        kind, default = (kind, None) if type(None) in getattr(kind, "__args__", ()) else (kind | None, None)
    bounds: dict[str, Any] = {"min": about.at_least, "max": about.at_most} if about.ranged else {}
    if about.positional:
        info = typer.Argument(help=field.description, metavar=about.metavar, **bounds)
    else:
        # A switch that is off by default has no opposite to type.
        bare = "bool" in str(kind) and default in (False, None)
        flags = about.flags or (flags_of(name, about) if bare else ())
        info = typer.Option(*flags, help=field.description, metavar=about.metavar, **bounds)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def start_and_show(command: Command, settings: Settings) -> None:
    """Make the run that the settings define, or go on with it, with its progress; print what came of it."""
    conditions = [_condition(command, text) for text in getattr(settings, "fail_if", None) or []]
    as_json, leader = bool(getattr(settings, "as_json", False)), current_ranks().leader
    console = _console(stderr=as_json, quiet=not leader)
    run = opened(command, settings, console)
    if getattr(settings, "estimate", False):
        _forecast(run, console, as_json=as_json)
        return
    found = worked(run, console)
    if not leader:
        return
    if as_json:
        say_json(json_of(found))
    else:
        run.home.show(found, console)
    end_if_any_holds(conditions, found.summary)


def _forecast(run: Run, console: Console, *, as_json: bool) -> None:
    """Do what it takes to say what a run will cost, and say it."""
    from robustvlm.report.words import forecast

    found = worked(run, console, run.estimate)
    if as_json and not console.quiet:
        say_json(found.model_dump_json(indent=2))
    folder = str(run.folder.path)
    console.print(forecast(found), markup=False)
    console.print(f"The clean pass is kept in {folder}; without --estimate the run goes on there.", markup=False)


def opened(command: Command, settings: Settings, console: Console) -> Run:
    """Check the settings and load what they name, with a word of it on a terminal."""
    from contextlib import nullcontext

    with console.status(command.loading) if console.is_terminal else nullcontext():
        return Run(command, settings, given=given_command())


def worked(run: Run, console: Console, act: Callable[..., Any] | None = None) -> Any:
    """Start a run, or do another `act` of it that takes an observer, with its progress; Ctrl-C says how to go on."""
    from rich.markup import escape

    from robustvlm.cli.console import Bars

    command = run.command
    if command.doing:
        spec = (run.manifest.get("model") or {}).get("spec") or command.name
        console.print(f"{command.doing} [bold]{escape(str(spec))}[/bold] -> {escape(str(run.folder.path))}")
    say_remarks(console, run.manifest)
    if run.ranks.size > 1:
        console.print(f"{run.ranks.size} processes share {command.shares}.")
    with interruptible(f"{command.kept} in '{run.folder.path}'"), Bars(console, plain=command.plain) as progress:
        return (act or run.start)(progress)


def json_of(run: FinishedRun[Any]) -> str:
    """Return a run's summary as JSON text."""
    try:
        text: str = run.summary.model_dump_json(indent=2)
    except ValueError:  # a name that is no Unicode text, as file names may be
        text = json.dumps(run.summary.model_dump(), indent=2, ensure_ascii=False)
    return text


def _condition(command: Command, text: str) -> Any:
    return command.load().parse_condition(text)  # type: ignore[attr-defined]  # only where there is --fail-if


def _console(*, stderr: bool, quiet: bool) -> Console:
    from robustvlm.cli.console import Console

    return Console(stderr=stderr, quiet=quiet)

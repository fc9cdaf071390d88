"""Commands of the command line made from their settings: what is typed, what is said meanwhile, how they end."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, get_type_hints

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.text import Text
from typer.models import ArgumentInfo

from robustvlm.cli.terminal import Prompts, say, say_json
from robustvlm.core.loading import telling
from robustvlm.core.ranks import current_ranks
from robustvlm.errors import UserError
from robustvlm.runs.run import Command, FinishedRun, Run
from robustvlm.runs.settings import Option, Settings, flags_of, repeatable
from robustvlm.text import address_shown, without_secrets

if TYPE_CHECKING:
    from robustvlm.cli.console import Console

# What is typed, checked before it is read


def check_given(tokens: Sequence[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what a command line can hold without anybody noticing: empty values, and an option given twice.

    An empty value is most often a shell variable that is not set, and as a path it would be the current folder.

    Args:
        tokens: what stands behind the command's name.
        parameters: of the command's function, annotated as for typer.

    Raises:
        UserError: naming the option.
    """

    known = {name: parameter for parameter in parameters.values() for name in option_names(parameter)}
    seen: dict[str, str] = {}
    for number, token in enumerate(tokens):
        if token == "--":
            break
        option, equals, value = token.partition("=")
        parameter = known.get(option)
        if parameter is None:
            if not token and (number == 0 or tokens[number - 1] not in known):
                raise UserError("an argument is empty: leave it out or give it a value")
            continue
        if not equals and number + 1 < len(tokens) and "bool" not in str(parameter.annotation):
            value = tokens[number + 1]
            equals = "="
        if equals and not value and parameter.default != "":
            raise UserError(f"the value of {option} is empty: leave the option out or give it a value")
        if "list[" not in str(parameter.annotation):
            if parameter.name in seen:
                if seen[parameter.name] == option:
                    raise UserError(f"{option} is given twice: say which value is meant")
                raise UserError(f"{seen[parameter.name]} and {option} contradict each other: give one of them")
            seen[parameter.name] = option


def option_names(parameter: inspect.Parameter) -> list[str]:
    """Return how an option is written on the command line; nothing for an argument."""
    info = parameter.annotation.__metadata__[0]
    if isinstance(info, ArgumentInfo):
        return []
    texts = [info.default, *(info.param_decls or ())]  # inside Annotated typer takes the first for a default
    declared = [part for text in texts if isinstance(text, str) for part in text.split("/") if part.startswith("-")]
    return declared or [f"--{parameter.name.replace('_', '-')}"]


# How commands that make runs close: interrupted, or by the conditions of `--fail-if`

_S = TypeVar("_S", contravariant=True)


class Condition(Protocol[_S]):
    """What was passed with `--fail-if`."""

    @property
    def text(self) -> str:
        """The condition as it was written."""

    def holds(self, summary: _S) -> bool:
        """Whether it is true of the run."""


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Let Ctrl-C end the program with exit code 130 and one line; `kept` says what is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        if current_ranks().fail("interrupted"):  # of several processes one speaks
            say(f"stopped; {kept}: repeat the command to go on", err=True)
        raise typer.Exit(130) from None


def say_remarks(console: Console, manifest: dict[str, Any]) -> None:
    """Say what a reader of the results has to know of the data, before the work begins."""

    for remark in manifest.get("remarks", ()):
        console.print(Text(f"Note: {remark}"), soft_wrap=True)


def end_if_any_holds(conditions: Sequence[Condition[_S]], summary: _S) -> None:
    """End the program with exit code 1, naming the conditions that hold of the run, if there are any."""
    failed = [condition.text for condition in conditions if condition.holds(summary)]
    if failed:
        say(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def given_command() -> str:
    """Return the command line as it can be given again, without the passwords, signatures and keys of URLs."""
    words = sys.argv[1:]
    return shlex.join(["robustvlm", *map(_shown, ["", *words], words)])


def _shown(before: str, word: str) -> str:
    """Return a word of a command line, given the one before it: of an endpoint any part of the query may be the key."""
    if before == "--llm":
        return address_shown(word)
    if word.startswith("--llm="):
        return f"--llm={address_shown(word.removeprefix('--llm='))}"
    return without_secrets(word)


def plain(value: object) -> str:
    """Keep rich from reading markup in user-given text."""

    return escape(str(value))


# How a command is made, started and shown

Act = Callable[[Command, Settings], None]


def typer_command(command: Command, act: Act | None = None) -> Callable[..., None]:
    """Return a function whose signature Typer reads: a parameter for every option of the settings, in their order.

    Args:
        act: what is done with the settings; by default `start_and_show`.
    """
    declared = command.settings
    hints = get_type_hints(declared)
    parameters = [
        _parameter(name, field, about, hints[name], declared.group_of(about))
        for name, field, about in declared.options()
    ]

    def run(**values: Any) -> None:
        # What was not given is None, or the default itself: the settings know their own.
        given = {name: value for name, value in values.items() if value is not None}
        (act or start_and_show)(command, declared(**given))

    run.__name__ = command.name.replace("-", "_")
    run.__doc__ = inspect.cleandoc(declared.__doc__ or "")
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(name: str, field: FieldInfo, about: Option, kind: Any, group: str) -> inspect.Parameter:
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
        info = typer.Option(*flags, help=field.description, metavar=about.metavar, rich_help_panel=group, **bounds)
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
    if not console.live:
        from robustvlm.cli.console import Bars

        with Bars(console, doing=command.loading):
            return Run(command, settings, given=given_command())
    with console.status(command.loading) as status, telling(Prompts(status.update)):
        return Run(command, settings, given=given_command())


def worked(run: Run, console: Console, act: Callable[..., Any] | None = None) -> Any:
    """Start a run, or do another `act` of it that takes an observer, with its progress; Ctrl-C says how to go on."""
    from robustvlm.cli.console import Bars

    command = run.command
    if command.doing:
        spec = (run.manifest.get("model") or {}).get("spec") or command.name
        console.print(f"{command.doing} [bold]{plain(spec)}[/bold] -> {plain(run.folder.path)}")
    say_remarks(console, run.manifest)
    if run.ranks.size > 1:
        console.print(f"{run.ranks.size} processes share {command.shares}.")
    bars = Bars(console, plain=command.plain, doing=command.doing)
    with interruptible(f"{command.kept} in '{run.folder.path}'"), bars as progress:
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

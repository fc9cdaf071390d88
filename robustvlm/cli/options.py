"""Options that several commands have, in the same words and read in the same way, and how commands close."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from typer.models import ArgumentInfo

from robustvlm.cli.terminal import say
from robustvlm.core.ranks import current_ranks
from robustvlm.text import without_secrets

if TYPE_CHECKING:
    from rich.console import Console


# Options that several commands have, in the same words and read in the same way

Classes = Annotated[Path | None, typer.Option(help="File of class names, one per line or a JSON list.")]
Templates = Annotated[Path | None, typer.Option(help="File of prompt templates, one per line with {}.")]
TreeFile = Annotated[Path | None, typer.Option(help="File of the class tree (JSON, YAML or CSV).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Out = Annotated[Path, typer.Option(help="Folder that holds the runs.")]
RunName = Annotated[
    str | None, typer.Option(help="Name of the run [default: made from the settings, so that they find it again].")
]
Resume = Annotated[
    bool | None,
    typer.Option("--resume/--fresh", help="Insist on an earlier run, or delete it. Default: continue if there is one."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Delete an earlier run of this name first.")]
SummaryAsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on standard output.")]


def check_given(tokens: Sequence[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what a command line can hold without anybody noticing: empty values, and an option given twice.

    An empty value is most often a shell variable that is not set, and as a path it would be the current folder.

    Args:
        tokens: what stands behind the command's name.
        parameters: of the command's function, annotated as for typer.

    Raises:
        UserError: naming the option.
    """
    from robustvlm.errors import UserError

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


def require_none(given: Mapping[str, object], why: str) -> None:
    """Refuse options that would have no effect.

    Example:
        >>> require_none({"--llm": None}, "is for --make-tree")
    """
    from robustvlm.errors import UserError

    useless = [option for option, value in given.items() if value not in (None, [])]
    if useless:
        raise UserError(f"{useless[0]} {why}")


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
    from rich.text import Text

    for remark in manifest.get("remarks", ()):
        console.print(Text(f"Note: {remark}"), soft_wrap=True)


def end_if_any_holds(conditions: Sequence[Condition[_S]], summary: _S) -> None:
    """End the program with exit code 1, naming the conditions that hold of the run, if there are any."""
    failed = [condition.text for condition in conditions if condition.holds(summary)]
    if failed:
        say(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def given_command() -> str:
    """Return the command line as it can be given again, without the passwords and signatures of URLs."""
    return shlex.join(["robustvlm", *map(without_secrets, sys.argv[1:])])


def plain(value: object) -> str:
    """Keep rich from reading markup in user-given text."""
    from rich.markup import escape

    return escape(str(value))


# The options that name a language model, shared by the commands that can ask one

LlmUrl = Annotated[
    str | None,
    typer.Option(
        "--llm",
        metavar="URL",
        help="OpenAI-compatible endpoint, as http://localhost:11434/v1; the key is read from ROBUSTVLM_LLM_KEY or "
        "OPENAI_API_KEY.",
    ),
]
LlmModel = Annotated[str | None, typer.Option("--llm-model", metavar="NAME", help="Model to ask at that endpoint.")]
LlmPrices = Annotated[
    str | None,
    typer.Option("--llm-prices", metavar="IN,OUT", help="Price of a million tokens, to show what was spent."),
]

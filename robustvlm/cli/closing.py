"""How commands that make runs close: interrupted, or by the conditions of `--fail-if`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

from robustvlm.cli.terminal import say
from robustvlm.core.foreign_text import without_secrets
from robustvlm.core.ranks import current_ranks

if TYPE_CHECKING:
    from rich.console import Console

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

"""How commands that make runs close: interrupted, or by the conditions of `--fail-if`."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import typer

from robustvlm.cli.app import end_if_any_holds, interruptible, plain


@dataclass(frozen=True)
class Above:
    """Holds of numbers above its own."""

    number: int

    @property
    def text(self) -> str:
        return f"x>{self.number}"

    def holds(self, summary: int) -> bool:
        return summary > self.number


def test_interrupted_it_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, interruptible("all is kept in 'here'"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr() == ("", "stopped; all is kept in 'here': repeat the command to go on\n")


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), interruptible("nothing"):
        raise ValueError("mine")


def test_every_condition_that_holds_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    end_if_any_holds([], 5)
    end_if_any_holds([Above(5), Above(6)], 5)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(typer.Exit) as ended:
        end_if_any_holds([Above(3), Above(5), Above(1)], 5)
    assert ended.value.exit_code == 1
    assert capsys.readouterr() == ("", "failed: x>3, x>1\n")


def test_markup_of_users_is_no_markup() -> None:
    assert plain("[bold]x") == r"\[bold]x"

"""Options written once: what is stored, what is refused, and in whose words."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from robustvlm.cli.app import option_names, typer_command
from robustvlm.commands import COMMANDS, command_of
from robustvlm.errors import BadSetting, UserError, setting
from robustvlm.runs.folder import default_name
from robustvlm.runs.settings import Settings, Shared, argument, option, shown_as, way


class Bake(Settings):
    """Bake."""

    flour: str = argument("rye", "What of.")
    minutes: int = option(10, "How long.", at_least=2, at_most=90, unit="minutes")
    salt: float = option(0.5, "Salt.", at_least=0)
    seeds: list[str] = option([], "Seeds.")
    classes: Path | None = Shared.CLASSES
    cover: bool = option(False, "Cover it.")
    watch: int = way(0, "How often to look.")
    out: Path = Shared.OUT
    name: str | None = Shared.NAME
    resume: bool | None = Shared.RESUME
    as_json: bool = shown_as(False, "As JSON.", flags=("--json",))


def test_what_defines_a_run_is_stored_and_nothing_else() -> None:
    made = Bake(flour="oat", seeds="poppy", classes="names.txt", out="here", watch=3)  # type: ignore[arg-type]
    assert made.stored() == {
        "flour": "oat",
        "minutes": 10,
        "salt": 0.5,
        "seeds": ["poppy"],
        "classes": "names.txt",
        "cover": False,
    }
    assert made.stored(salt=0.25)["salt"] == 0.25
    assert Bake(out="here", watch=3).stored() == Bake().stored()


@pytest.mark.parametrize(
    ("wrong", "python", "typed"),
    [
        ({"minutes": 1}, "minutes must be at least 2 minutes, got 1", "--minutes must be at least 2 minutes, got 1"),
        ({"minutes": 91}, "minutes must be at most 90 minutes, got 91", "--minutes must be at most 90 minutes, got 91"),
        ({"salt": float("nan")}, "salt must be at least 0, got nan", "--salt must be at least 0, got nan"),
        ({"salt": float("inf")}, "salt must be at least 0, got inf", "--salt must be at least 0, got inf"),
        ({"minute": 3}, "there is no option 'minute': did you mean 'minutes'?", None),
        ({"minutes": "x"}, "minutes should be a valid integer", "--minutes should be a valid integer"),
    ],
)
def test_a_wrong_value_is_told_by_argument_or_flag(wrong: dict[str, object], python: str, typed: str | None) -> None:
    with pytest.raises(UserError) as caught:
        Bake(**wrong)
    assert str(caught.value).startswith(python)
    assert caught.value.as_typed().startswith(typed or python)


def test_marks_survive_user_text_with_braces_and_secrets_are_cut() -> None:
    error = UserError(
        f"'a {{}} photo' of http://me:s3cret@h/x: pass {setting('val_limit', 'N')}, not {setting('ebm', False)}"
    )
    assert str(error) == "'a {} photo' of http://***@h/x: pass val_limit=N, not ebm=False"
    assert error.as_typed() == "'a {} photo' of http://***@h/x: pass --val-limit N, not --no-ebm"
    assert BadSetting("val", "is needed").as_typed() == "--val is needed"


def test_fresh_and_resume_are_one_switch() -> None:
    asked = [Bake(resume=value).fresh_or_resume for value in (None, True, False)]
    assert [(a["fresh"], a["resume"]) for a in asked] == [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_option_is_typed_under_its_python_name(kind: str) -> None:
    """A Python caller who knows the command line knows the arguments, but for --json and what prints."""
    command = command_of(kind)
    parameters = inspect.signature(typer_command(command)).parameters
    assert list(parameters) == list(command.settings.model_fields)
    for name, _, about in command.settings.options():
        flags = option_names(parameters[name])
        assert bool(flags) != about.positional
        if about.place != "terminal" and flags:
            # A Python argument named `compile` would hide the builtin.
            assert ("--compile" if name == "compiled" else f"--{name.replace('_', '-')}") in flags


# Digests of the settings of fixed commands, as they were before options were declared in one place: a name that changes
# hides every run made before.
NAMES = {
    "purify": ({"device": "cpu"}, "purify-tiny-a25639af"),
    "build": ({"smooth": "0.25:8"}, "build-tiny-4b7e6816"),
    "tune-prompts": ({"device": "cpu"}, "tune-prompts-tiny-00448fd4"),
    "tune-prompts coop": ({"device": "cpu", "ebm": False, "shots": 0}, "tune-prompts-tiny-471968c8"),
    "detect": (
        {"device": "cpu", "scores": "mcm", "norm": "L2", "fit": "none", "classes": "a.txt", "under_attack": True},
        "detect-tiny-d7fda8fb",
    ),
    "soup": ({"models": ["a", "b"], "device": "cpu"}, "soup-tiny-b0671983"),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_settings_of_earlier_runs_are_found_again(case: str) -> None:
    options, name = NAMES[case]
    kind = case.split()[0]
    settled: dict[str, object] = {"eps": 1 / 255, "eps_text": "1/255"} if kind == "soup" else {}
    if kind == "detect":
        settled = {"unknown": [], "scores": ["mcm"], "words": "w", "under_attack": None}
    assert default_name(kind, "tiny", "", command_of(kind).settings(**options).stored(**settled)) == name

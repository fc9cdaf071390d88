"""The help as it is drawn on 80 columns: nothing lost, examples that can be typed, and the way to the docs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import environment

from robustvlm.cli import help as pages
from robustvlm.cli.main import app
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
from robustvlm.runs.settings import Option, Settings, option, shown_as, way

ROOT = Path(__file__).parents[2]
PROGRAM: Any = typer.main.get_command(app)
NAMES = list(PROGRAM.commands)
SETTINGS = {
    command.name: command.settings
    for command in (
        *(ATTACK, CERTIFY, EVALUATE, PREDICT, DETECT, JUDGE, FINETUNE, SOUP, IMMUNIZE, TUNE_PROMPTS, PURIFY, BUILD),
    )
}
EXAMPLES = [(name, line) for name, examples in pages.EXAMPLES.items() for _, line in examples]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command's --help prints on a terminal of 80 columns without colours."""
    for key, value in {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(key, value)

    def draw(*words: str) -> str:
        app([*words, "--help"], standalone_mode=False)
        return capsys.readouterr().out

    return draw


def test_every_command_has_a_group_examples_and_a_page() -> None:
    assert set(pages.EXAMPLES) == set(pages.PAGES) == set(NAMES)
    assert sorted(name for names in pages.GROUPS.values() for name in names) == sorted(NAMES)
    assert all((ROOT / "docs" / page).is_file() for page in pages.PAGES.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_or_broken_on_80_columns(name: str, drawn: Any) -> None:
    page = drawn(name)
    assert "…" not in page
    text = "".join(" " if character in "│╭╰╮╯─" else character for character in page)
    words = set(text.split())
    squeezed = "".join(text.split())
    for parameter in PROGRAM.commands[name].params:
        said = (parameter.help or "").replace("\\[", "[")
        assert set(parameter.opts + parameter.secondary_opts) <= words or "--" not in parameter.opts[0]
        assert set(said.split()) <= words, f"a word of {parameter.name} is broken"
        assert "".join(said.split()) in squeezed, f"the text of {parameter.name} is not whole"
        default = parameter.default
        if parameter.required or default is None or default is False or default == "":
            continue
        default = "yes" if default is True else default
        shown = f"[default:{default}]" if default != "yes" else f"[default:{parameter.opts[0].lstrip('-')}]"
        assert "".join(shown.split()) in squeezed, f"the default of {parameter.name} is not shown"
    lines = page.splitlines()
    for _, line in pages.EXAMPLES[name]:
        assert f"   {line}" in lines, "an example cannot be copied"
        assert len(line) <= 77
    assert any(line.endswith(pages.PAGES[name]) for line in lines[-3:])


@pytest.mark.parametrize("name", NAMES)
def test_options_stand_in_groups(name: str) -> None:
    groups = {getattr(parameter, "rich_help_panel", None) for parameter in PROGRAM.commands[name].params}
    assert "Run" in groups
    assert "Options" not in groups
    options = [parameter for parameter in PROGRAM.commands[name].params if parameter.param_type_name == "option"]
    assert all(parameter.rich_help_panel for parameter in options)


def test_the_group_of_an_option_is_its_own_or_the_one_of_its_place() -> None:
    class Cook(Settings):
        group = "Cooking"
        minutes: int = option(10, "How long.")
        salt: bool = option(True, "With it.", group="Taste")
        pot: str = way("large", "Which.")
        as_json: bool = shown_as(False, "As JSON.")

    groups = {name: Cook.group_of(about) for name, _, about in Cook.options()}
    assert groups == {"minutes": "Cooking", "salt": "Taste", "pot": "Run", "as_json": "Output"}
    assert Cook.group_of(Option()) == "Cooking"
    assert "group" not in Cook().stored()


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_are_commands_as_they_stand(name: str, line: str) -> None:
    program, *words = shlex.split(line)
    assert program == "robustvlm"
    command = PROGRAM.commands[words[0]]
    parsed = command.make_context(words[0], words[1:]).params
    assert name in pages.EXAMPLES
    if words[0] in SETTINGS:
        given = {key: value for key, value in parsed.items() if value is not None and key != "no_code"}
        SETTINGS[words[0]](**given)


def test_an_example_that_went_stale_would_be_found() -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        PROGRAM.commands["attack"].make_context("attack", ["--epsilon", "1"])


def test_the_docs_are_found_on_the_site_and_in_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Metadata:
        def __init__(self, *entries: str) -> None:
            self.entries = entries

        def get_all(self, name: str) -> list[str] | None:
            assert name == "Project-URL"
            return list(self.entries) or None

    monkeypatch.setattr("importlib.metadata.metadata", lambda _: Metadata())
    assert pages.documentation("attacks.md") == str(ROOT / "docs" / "attacks.md")

    # as it is installed: no checkout around the package, the pages in share/doc
    monkeypatch.setattr(pages, "__file__", str(tmp_path / "lib" / "robustvlm" / "cli" / "help.py"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert pages.documentation("attacks.md") is None
    assert pages.ending("attack")[-1] == f"  {pages.EXAMPLES['attack'][-1][1]}"
    installed = tmp_path / "share" / "doc" / "robustvlm" / "attacks.md"
    installed.parent.mkdir(parents=True)
    installed.write_text("Attacks")
    assert pages.documentation("attacks.md") == str(installed)

    site = Metadata("Source, https://code.example", "Documentation, https://docs.example/robustvlm/")
    monkeypatch.setattr("importlib.metadata.metadata", lambda _: site)
    assert pages.documentation("attacks.md") == "https://docs.example/robustvlm/attacks.md"


def test_the_programs_help_lists_commands_under_headings(drawn: Any) -> None:
    page = drawn()
    at = [page.index(f"─ {heading} ─") for heading in pages.GROUPS]
    assert at == sorted(at)
    assert "--install-completion" in page
    assert "…" not in page


def test_the_shell_completes_commands_and_options(tmp_path: Path) -> None:
    def completed(words: str, number: int) -> list[str]:
        asked = {"_ROBUSTVLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", _AS_INSTALLED],
            capture_output=True, text=True, cwd=tmp_path, env=environment() | asked, timeout=120, check=True,
        )  # fmt: skip
        assert " torch\n" not in done.stderr, "a completion must not wait for the heavy libraries"
        return done.stdout.split()

    assert completed("robustvlm att", 1) == ["attack"]
    assert completed("robustvlm attack --second", 2) == ["--second-opinion"]


_AS_INSTALLED = "import sys; sys.argv = ['robustvlm']; from robustvlm.__main__ import run; run()"

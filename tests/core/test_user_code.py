"""User code: one door, announced where a file names it, refused on request, and never a success by ending."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from robustvlm.core.user_code import NO_CODE, code_policy, import_user_module, named_by, no_exit
from robustvlm.errors import UserError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(NO_CODE, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "some_users_module", raising=False)
    file = tmp_path / "some_users_module.py"
    file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nthing = 1\n")
    return file


SPEC = "some_users_module:thing"


@pytest.mark.parametrize("value", ["1", "true", "yes", "2"])
def test_the_environment_refuses_code(module: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(NO_CODE, value)
    with named_by("the card of 'x'"), pytest.raises(UserError, match=r"named by the card of 'x', is code.*--no-code"):
        import_user_module(SPEC)
    assert not (module.parent / "ran").exists()


@pytest.mark.parametrize("value", ["", "0", "no", "false"])
def test_the_environment_may_allow_code(module: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(NO_CODE, value)
    assert import_user_module(SPEC).thing == 1
    assert (module.parent / "ran").exists()


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("given", "source", "said"),
    [
        (None, None, False),
        (None, "a card", True),
        (["attack", SPEC], None, False),
        (["attack", f"--model={SPEC}+smooth:0.25"], "a card", False),
        (["attack", "folder"], "a card", True),
        (["attack", "folder"], None, True),
        (["attack", f"other.{SPEC}"], None, True),
        (["attack", f"{SPEC}.other"], None, True),
    ],
)
def test_code_is_announced_unless_the_user_named_it(
    given: list[str] | None, source: str | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "robustvlm"), code_policy(given=given):
        if source is None:
            import_user_module(SPEC)
        else:
            with named_by(source):
                import_user_module(SPEC)
    assert [SPEC in record.getMessage() for record in caplog.records] == [True] * said


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("done"), SystemExit(), GeneratorExit()])
def test_ending_the_program_is_a_failure(error: BaseException) -> None:
    with pytest.raises(UserError, match="importing 'x' ended the program"), no_exit("importing 'x'"):
        raise error


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt), no_exit("x"):
        raise KeyboardInterrupt

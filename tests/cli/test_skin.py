"""The outer skin of every command: no traceback, no leak, no success that user code declares, nothing steered."""

from __future__ import annotations

import builtins
import errno
import inspect
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
from command_line import MEAN, OWN, Call

from robustvlm.cli import terminal
from robustvlm.cli.app import option_names
from robustvlm.cli.console import Bars, Console
from robustvlm.cli.main import app
from robustvlm.errors import UserError

pytestmark = pytest.mark.usefixtures("own_place")
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e"


def only_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


ENDS = {
    "import": "raise SystemExit(0)\n",
    "factory": "class Ends(Mean):\n    def __init__(self):\n        raise SystemExit(0)\n",
    "trial": "class Ends(Mean):\n    def encode_image(self, pixels):\n        raise SystemExit\n",
    "later": (
        "class Ends(Mean):\n    calls = 0\n    def encode_image(self, pixels):\n        Ends.calls += 1\n"
        "        if Ends.calls > 6:\n            raise SystemExit(0)\n        return super().encode_image(pixels)\n"
    ),
    "other": (
        "class Ends(Mean):\n    calls = 0\n    def encode_image(self, pixels):\n        Ends.calls += 1\n"
        "        if Ends.calls > 6:\n            raise GeneratorExit\n        return super().encode_image(pixels)\n"
    ),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("when", ENDS)
def test_code_that_ends_the_program_is_a_failure(call: Call, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.delitem(sys.modules, "ending_encoders", raising=False)
    Path("ending_encoders.py").write_text(MEAN + ENDS[when])
    ended = call("attack", "ending_encoders:Ends", *OWN[2:], "--checks", "none", "--fail-if", "asr>0")
    assert ended.code == 2
    assert "ended the program" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@pytest.mark.usefixtures("place")
def test_code_that_fails_late_is_told_from_a_fault_of_ours(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ending_encoders", raising=False)
    Path("ending_encoders.py").write_text(MEAN + ENDS["later"].replace("SystemExit(0)", "ZeroDivisionError('here')"))
    ended = call("attack", "ending_encoders:Ends", *OWN[2:], "--checks", "none")
    assert ended.code == 2
    assert "ZeroDivisionError: here" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


@pytest.fixture
def card(place: Path) -> Path:
    """The folder of a model whose card names code, as somebody may pass it on."""
    folder = place / "given"
    folder.mkdir()
    content = {"format": 1, "kind": "purify", "settings": {}, "base": {"spec": "own_encoders:Mean"}}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("command", ["evaluate", "attack", "certify", "export"])
def test_code_that_a_card_names_is_announced_first(call: Call, card: Path, command: str) -> None:
    (card.parent / "own_encoders.py").write_text(f"raise RuntimeError('{HOSTILE}')\n")
    ended = call(command, "given", *(["out"] if command == "export" else ["--data", "imagefolder:photos"]))
    assert ended.code == 2
    note, error = ended.err.splitlines()
    assert note == "note: running code: importing 'own_encoders:Mean', named by the card of 'given'"
    assert r"\x1b[31mred\u202e" in error


@pytest.mark.parametrize("how", ["option", "environment"])
@pytest.mark.parametrize("spec", ["given", "own_encoders:Mean", "given+smooth:0.25"])
def test_code_is_refused_on_request(
    call: Call, card: Path, monkeypatch: pytest.MonkeyPatch, how: str, spec: str
) -> None:
    (card.parent / "own_encoders.py").write_text("open('ran', 'w').close()\n")
    if how == "environment":
        monkeypatch.setenv("ROBUSTVLM_NO_CODE", "1")
    ended = call("certify", spec, "--data", "imagefolder:photos", *(["--no-code"] if how == "option" else []))
    assert ended.code == 2
    assert "is code, and code is refused (--no-code or ROBUSTVLM_NO_CODE)" in only_line(ended.err)
    assert not Path("ran").exists()
    assert call("evaluate", "tiny", "--limit", "2", "--no-code").code == 0


@pytest.mark.usefixtures("place")
def test_an_audit_announces_the_code_that_its_run_names(call: Call) -> None:
    run = ["certify", "own_encoders:Mean", "--data", "imagefolder:photos", "--samples", "200", "--limit", "2"]
    assert call(*run, "--name", "c").code == 0
    refused = call("certify", "--audit", "c", "--no-code")
    assert refused.code == 2
    assert "named by the manifest of 'runs/c', is code, and code is refused" in only_line(refused.err)
    audited = call("certify", "--audit", "c", "--audit-starts", "1", "--audit-steps", "1")
    assert "note: running code: importing 'own_encoders:Mean', named by the manifest of 'runs/c'" in audited.err


SQUARES = """
from PIL import Image
from robustvlm.data import DataSource, Sample
class Squares(DataSource):
    def __init__(self):
        super().__init__("squares", ["red", "blue"])
    def ids(self):
        return ["a", "b"]
    def _stream(self, keep):
        for number, name in enumerate(self.ids()):
            if keep(name):
                yield Sample(name, Image.new("RGB", (8, 8), ("red", "blue")[number]), number)
"""


def test_an_audit_announces_data_and_gallery_that_are_code(
    call: Call, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "own_squares.py").write_text(SQUARES)
    monkeypatch.delitem(sys.modules, "own_squares", raising=False)
    shared = ["certify", "own_encoders:Mean", "--samples", "200"]
    assert call(*shared, "--data", "own_squares:Squares", "--name", "d").code == 0
    recall = ["--claim", "recall", "--top", "1", "--gallery", "own_squares:Squares", "--limit", "1"]
    ended = call(*shared, "--data", "imagefolder:photos", *recall, "--name", "g")
    assert ended.code == 0, ended.err
    assert "named by" not in ended.err  # the user named it
    for name in ("d", "g"):
        audited = call("certify", "--audit", name, "--audit-starts", "1", "--audit-steps", "1")
        assert f"importing 'own_squares:Squares', named by the manifest of 'runs/{name}'" in audited.err
    refused = call("certify", "--audit", "d", "--no-code")
    assert refused.code == 2
    assert "named by the manifest of 'runs/d', is code, and code is refused" in only_line(refused.err)


def test_names_of_others_cannot_steer_the_terminal(call: Call, place: Path) -> None:
    for name in ("red", "blue"):
        (place / "photos" / name).rename(place / "photos" / f"{name}[link=x] :cat:")
    (place / "photos" / "blue[link=x] :cat:" / f"0{HOSTILE}.png").write_bytes(b"no picture")
    for arguments in (["data", "imagefolder:photos", "--check"], ["evaluate", *OWN[1:4]]):
        ended = call(*arguments)
        assert ended.code == 0, ended.err
        assert not {"\x1b", "\x07", "\u202e"} & {*ended.out, *ended.err}
    shown = call("data", "imagefolder:photos", "--check")
    assert r"\x1b[31mred\u202e" in shown.out
    assert "[link=x] :cat:" in shown.out.replace("\n", "")
    content = json.loads(call("data", "imagefolder:photos", "--json", "--check").out)
    assert any("\x1b]0;" in fault["id"] for fault in content["check"]["faults"])


def test_a_card_cannot_steer_the_terminal(call: Call, card: Path) -> None:
    (card / "model.json").write_text(json.dumps({"format": 1, "kind": HOSTILE, "settings": {}}))
    ended = call("evaluate", "given", "--data", "imagefolder:photos")
    assert ended.code == 2
    assert r"\x1b]0;owned\x07\x1b[31mred\u202e" in only_line(ended.err)


def test_markup_in_names_is_text_and_never_a_crash(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=80)
    console.print("a [/red] b", "c [bold]d[/bold]")
    console.print(f"{HOSTILE} http://me:s3cret@host/a")
    out = capsys.readouterr().out
    assert out == "a [/red] b c d\n\\x1b]0;owned\\x07\\x1b[31mred\\u202e http://***@host/a\n"


WHERE = {
    "data": "robustvlm.data.open_data",
    "evaluate": "robustvlm.commands.evaluate.work.open_data",
    "attack": "robustvlm.commands.attack.work.open_work",
    "certify": "robustvlm.commands.certify.work.open_work",
    "report": "robustvlm.runs.records.find_run",
    "models": "robustvlm.models.list_models",
    "export": "robustvlm.commands.export.load_pipeline",
    "immunize": "robustvlm.commands.immunize.work.open_work",
    "tune-prompts": "robustvlm.commands.prompts.work.open_work",
}


@contextmanager
def raising(where: str, error: BaseException) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, fail)
        yield


@pytest.mark.parametrize("command", WHERE)
def test_an_interrupt_at_any_moment_says_so(call: Call, command: str) -> None:
    arguments = {"report": ["x"], "export": ["tiny", "out"]}.get(command, [])
    with raising(WHERE[command], KeyboardInterrupt()):
        ended = call(command, *arguments)
    assert (ended.code, only_line(ended.err)) == (130, "interrupted")


@pytest.mark.parametrize("moment", ["loading", "later"])
def test_an_interrupt_while_the_program_loads_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from robustvlm.__main__ import run

    handlers: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append((number, handler)))
    if moment == "later":
        monkeypatch.setattr("robustvlm.cli.main.main", interrupted)
    else:
        monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        run()
    monkeypatch.undo()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert handlers[0][0] == signal.SIGTERM  # type: ignore[index]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_options_are_read_says_so(call: Call) -> None:
    with raising("robustvlm.cli.main.check_given", KeyboardInterrupt()):
        assert call("data").err == "interrupted\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustvlm.cli.main.app", lambda **_: 130)  # what typer makes of one
        ended = call("data")
    assert (ended.code, ended.err) == (130, "interrupted\n")


class SafetensorError(Exception):
    """Named as the package's, which is no OSError."""


class ValidationError(ValueError):
    def errors(self) -> list[dict[str, object]]:
        return [{"loc": ("config", "eps"), "msg": "Input should be a number"}]


FAILURES: dict[str, tuple[BaseException, int, str]] = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
    "full disk, safetensors": (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "disk is full"),
    "damaged file": (SafetensorError("invalid header"), 2, "a safetensors file cannot be read or written: invalid"),
    "no permission": (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "Permission denied: 'x'"),
    "out of memory": (MemoryError(), 2, "memory ran out"),
    "oneDNN": (RuntimeError("could not create a primitive"), 2, "memory ran out"),
    "too deep": (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
    "bad JSON": (json.JSONDecodeError("Expecting value", "x", 0), 2, "a JSON file is damaged"),
    "bad text": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), 2, "not valid Unicode"),
    "surrogates": (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates"), 2, "not valid Unicode"),
    "wrong setting": (ValidationError(), 2, "config.eps: Input should be a number"),
    "huge number": (OverflowError("int too big to convert"), 2, "a number is too large"),
    "huge number for torch": (ValueError("Overflow when unpacking long long"), 2, "a number is too large"),
    "end of file": (EOFError(), 2, "a file ends too early"),
    "success of others": (SystemExit(0), 2, "ended the program"),
    "a fault": (KeyError("x"), 3, "a fault of robustvlm, please report it: KeyError: 'x'"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_every_failure_is_one_line(call: Call, kind: str) -> None:
    error, code, said = FAILURES[kind]
    with raising("robustvlm.models.list_models", error):
        ended = call("models")
    line = only_line(ended.err)
    # Raised by the test itself, which is code of its own.
    if kind == "a fault":
        assert (ended.code, line) == (2, line)
        assert "code outside robustvlm failed: KeyError: 'x' (test_skin.py:" in line
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(terminal, "_users_frame", lambda _: None)
            with raising("robustvlm.models.list_models", error):
                ended = call("models")
        line = only_line(ended.err)
    assert ended.code == code
    assert said in line
    assert line.startswith("error: ")


def test_a_reader_that_went_away_is_no_failed_condition(call: Call) -> None:
    with raising("robustvlm.models.list_models", BrokenPipeError()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustvlm.cli.terminal.drop_output", lambda: None)
        ended = call("models")
    assert (ended.code, ended.err) == (141, "")


def test_a_reader_that_goes_away_in_the_midst_of_a_table_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        Console(width=60).print("a line")


def test_colours_that_are_forced_make_no_terminal_of_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in notebooks and in continuous integration
    console = Console(width=60)
    assert console.is_terminal
    with Bars(console, plain="begin") as bars:
        bars.begin("clean", total=2)
        bars.advance(2)
    assert capsys.readouterr().out == "clean\n"


def test_streams_that_are_closed_or_narrow_are_made_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    terminal.open_streams()
    terminal.say("né", err=True)
    terminal.say("né \udc80")
    terminal.say_json('{"né": "\x9b👩"}')
    narrow.flush()
    first, second = narrow.buffer.getvalue().decode("ascii").splitlines()  # type: ignore[attr-defined]
    assert first == r"n\xe9 \udc80"
    assert json.loads(second) == {"né": "\x9b👩"}
    sys.stderr.close()


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("command", [["export", "tiny", "runs/r"], ["soup", "tiny", "tiny", "--name", "r"]])
def test_weights_on_a_full_disk_end_in_one_line_and_can_be_written_later(
    call: Call, tmp_path: Path, command: list[str]
) -> None:
    with small_disk(1_000_000):
        ended = call(*command)
    assert ended.code == 2
    assert "is full" in only_line(ended.err)
    assert not list(tmp_path.rglob("*.part"))
    assert call(*command).code == 0


BAD: dict[str, tuple[list[str], str]] = {
    "empty value": (["data", "--classes", ""], "the value of --classes is empty"),
    "empty value, joined": (["attack", "--name="], "the value of --name is empty"),
    "empty argument": (["data", ""], "an argument is empty"),
    "twice": (["attack", "--eps", "1/255", "--eps=2/255"], "--eps is given twice"),
    "contradiction": (["attack", "--resume", "--fresh"], "--resume and --fresh contradict each other"),
    "nothing to make": (["data", "--llm", "http://x/v1", "--llm-model", "m"], "--llm is for --make-tree"),
    "nothing to price": (["immunize", "--llm-prices", "1,2"], "--llm-prices is for --llm URL"),
    "no prices": (["immunize", "--llm-prices", "cheap"], "prices are written IN,OUT"),
    "nothing to measure": (["soup", "tiny", "tiny", "--classes", "names"], "--classes is for --val"),
    "nothing to audit": (["certify", "--audit-steps", "0"], "--audit-steps is for --audit RUN"),
    "no gate of an audit": (["certify", "--audit", "x", "--fail-if", "mean_radius<1"], "--fail-if is not for --audit"),
    "password": (["data", "wds:ftp://me:s3cret@host/a.tar"], "ftp://***@host/a.tar"),
    "signature": (["data", "nope:https://h/a.tar?sig=s3cret"], "unknown data kind 'nope'"),
    "key of a language model": (
        ["data", "--make-tree", "llm", "--out", "t.json", "--llm", "gopher://h/v1?api_key=s3cret", "--llm-model", "m"],
        "gopher://h/v1?api_key=***",
    ),
    "steering": (["attack", "--goal", HOSTILE], r"\x1b[31m"),
    "very long": (["attack", "--goal", 5000 * "x"], "..."),
}


@pytest.mark.parametrize("kind", BAD)
def test_odd_command_lines_end_in_one_short_line(call: Call, kind: str) -> None:
    arguments, said = BAD[kind]
    ended = call(*arguments)
    assert ended.code == 2
    line = only_line(ended.err)
    assert said in line
    assert "s3cret" not in ended.out + ended.err
    assert "\x1b" not in line
    assert len(line) < 2000


COMMANDS = {str(command.name): command.callback for command in app.registered_commands}
NUMBERS = {"int": ["1e3"], "float": ["1,5"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_refuses_what_it_cannot_be(call: Call, command: str) -> None:
    """Nothing is loaded: this is about how the options are declared."""
    callback = COMMANDS[command]
    assert callback is not None
    parameters = inspect.signature(callback).parameters
    assert "no_code" in parameters
    # An argument that is missing would be complained of first.
    needed = ["x", "y"] if command in ("export", "soup", "report", "predict") else []
    for parameter in parameters.values():
        names, kind = option_names(parameter), str(get_args(parameter.annotation)[0])
        values = [] if "bool" in kind else [] if parameter.default == "" else [""]
        values += [bad for number, texts in NUMBERS.items() if number in kind for bad in texts]
        for name in names:
            for value in values:
                ended = call(command, *needed, f"{name}={value}")
                assert ended.code == 2, (name, value)
                assert name in only_line(ended.err)


def test_a_repeatable_option_may_be_given_twice(call: Call) -> None:
    ended = call("attack", "--fail-if", "asr>50%", "--fail-if", "nonsense")
    assert "cannot read the condition" in only_line(ended.err)


def test_text_that_is_no_unicode_in_a_manifest_is_kept(tmp_path: Path) -> None:
    from robustvlm.core.files import write_text

    write_text(tmp_path / "a.json", json.dumps({"name": "a\udc80"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "a\udc80"}


def test_private_text_is_for_nobody_else(tmp_path: Path) -> None:
    from robustvlm.core.files import write_text

    write_text(tmp_path / "a", "x", private=True)
    assert os.stat(tmp_path / "a").st_mode & 0o777 == 0o600


def test_an_error_never_holds_a_password() -> None:
    assert "s3cret" not in str(UserError("no shard at https://me:s3cret@host/a.tar?sig=s3cret"))

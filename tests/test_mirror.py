"""The command line and the library say the same: `robustvlm VERB MODEL --opt v` is `rv.VERB(MODEL, opt=v)`."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import typer

import robustvlm as rv
from robustvlm.cli.main import app
from robustvlm.commands import COMMANDS, command_of
from robustvlm.runs.settings import flags_of, repeatable

ROOT = Path(__file__).parents[1]
PROGRAM: Any = typer.main.get_command(app)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_and_its_function_have_the_same_options(kind: str) -> None:
    function, typed = getattr(rv, kind.replace("-", "_")), {p.name: p for p in PROGRAM.commands[kind].params}
    told = dict(inspect.signature(function).parameters)
    assert told.pop("observer").default is None
    for name, field, about in command_of(kind).settings.options():
        flag = typed.pop(name)
        assert flag.help.replace("\\[", "[") == field.description
        if not about.positional:
            assert {*"/".join(flags_of(name, about)).split("/")} <= {*flag.opts, *flag.secondary_opts}
        if about.place == "terminal":
            assert name not in told
            continue
        here = told.pop(name)
        assert flag.required == (here.default is inspect.Parameter.empty) == field.is_required()
        if not field.is_required():
            assert here.default == field.get_default()
            hidden = repeatable(field) or not about.shown
            assert (flag.default or None) == ((None if hidden else here.default) or None), name
        assert f"    {name}: {field.description}" in (inspect.getdoc(inspect.unwrap(function)) or "")
    assert not told
    assert set(typed) == {"no_code"}


def test_export_has_the_same_options_too() -> None:
    """It makes no run and so has no settings; its function is the mirror all the same."""
    typed = {p.name: p for p in PROGRAM.commands["export"].params}
    told = inspect.signature(rv.export).parameters
    assert set(typed) - {"no_code"} == set(told)
    for name, parameter in told.items():
        assert typed[name].required == (parameter.default is inspect.Parameter.empty)
        if not typed[name].required:
            assert (typed[name].default or None) == (parameter.default or None)
    with pytest.raises(rv.UserError, match=r"^to is one of open_clip, transformers, got 'onnx'"):
        rv.export("tiny", "out", to="onnx")


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_name_that_is_no_option_is_refused_with_the_nearest(kind: str) -> None:
    function = getattr(rv, kind.replace("-", "_"))
    with pytest.raises(rv.UserError, match="no option 'devise': did you mean 'device'"):
        function(*(["tiny", "tiny"],) if kind == "soup" else (), devise="cpu")


def test_editors_and_type_checkers_read_the_same() -> None:
    spec = importlib.util.spec_from_file_location("library_stub", ROOT / "tools" / "library_stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = module.FACE.read_text(encoding="utf-8")
    assert "".join(kept.split()) == "".join(module.stub().split()), "renew it: python tools/library_stub.py"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rv.attack("tiny", estimate=True), "'estimate' is for the command line"),
        (lambda: rv.detect("tiny", fail_if=["auroc:mcm>0"]), "'fail_if' is for the command line"),
        (lambda: rv.evaluate("tiny", as_json=True), "'as_json' is for the command line"),
        (lambda: rv.attack("tiny", fresh=True, resume=True), "contradict each other"),
        (lambda: rv.soup("tiny"), "at least 2 models, got 1"),
        (lambda: rv.predict(3, data="emoji"), "model must be a spec or what load_classifier returns, got a int"),
    ],
)
def test_what_a_caller_cannot_mean_is_refused(call: Any, said: str) -> None:
    with pytest.raises(rv.UserError, match=said) as caught:
        call()
    assert "--" not in str(caught.value)


def test_an_abstaining_prediction_needs_copies_that_do_not_change_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from robustvlm.defenses.smoothing import SmoothedVLM

    asked = {"data": "emoji", "limit": 1, "alpha": 0.1, "device": "cpu"}
    assert len(rv.predict("tiny+smooth:0.05:8", **asked).classes) == 1
    plain = SmoothedVLM.encode_noisy
    monkeypatch.setattr(SmoothedVLM, "encode_noisy", lambda self, noisy: plain(self, noisy - noisy.mean(0)))
    with pytest.raises(rv.UserError, match="alpha needs independent draws"):
        rv.predict("tiny+smooth:0.05:8", **asked)

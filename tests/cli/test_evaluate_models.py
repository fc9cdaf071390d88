"""`robustvlm evaluate` and `robustvlm models` as a user meets them, on the bundled model and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import robustvlm as rv
from robustvlm.cli.app import typer_command
from robustvlm.cli.inspect import models
from robustvlm.commands.evaluate import EVALUATE
from robustvlm.errors import UserError

app = typer.Typer()
app.command("evaluate")(typer_command(EVALUATE))
app.command()(models)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_evaluate_json_holds_rates_that_agree_with_each_other() -> None:
    result = json.loads(run("evaluate", "--limit", "40", "--batch-size", "16", "--device", "cpu", "--json"))
    accuracy = result["accuracy"]
    assert (result["model"], result["images"], accuracy["total"]) == ("tiny", 40, 40)
    assert result["data"].startswith("emoji")
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert accuracy["method"] == "Clopper-Pearson, each group once"  # drawings have copies
    assert 0 <= result["calibration_error"] <= 1
    # A tree's coarser levels come later and can only be easier.
    values = [level["accuracy"]["value"] for level in result["superclass_accuracy"]]
    assert len(values) >= 2
    assert [accuracy["value"], *values] == sorted([accuracy["value"], *values])


def test_from_python_it_gives_the_same_numbers() -> None:
    typed = json.loads(run("evaluate", "--limit", "9", "--device", "cpu", "--json"))
    found = rv.evaluate("tiny", limit=9, device="cpu", out="others")
    assert typed | {"seconds": 0} == json.loads(found.model_dump_json()) | {"seconds": 0}
    assert (found.images, found.accuracy, found.images_per_second > 0) == (9, found.summary.accuracy, True)
    with pytest.raises(AttributeError, match="no attribute 'acuracy'"):
        _ = found.acuracy
    with pytest.raises(UserError, match=r"^limit must be at least 1 image, got 0"):
        rv.evaluate("tiny", limit=0)


def test_evaluate_prints_a_table() -> None:
    output = run("evaluate", "tiny", "--data", "emoji?split=val", "--limit", "8", "--device", "cpu")
    for text in ("tiny on emoji?split=val", "accuracy", "95% interval", "calibration error", "8 images"):
        assert text in output


def test_models_lists_filters_and_suggests() -> None:
    output = run("models")
    assert "hf-hub:ORG/REPO" in output
    assert "\ntiny  (bundled)\n" in output
    assert "ViT-B-32/laion2b_s34b_b79k" in output
    found = json.loads(run("models", "--filter", "SigLIP2", "--json"))["models"]
    assert found
    assert all("siglip2" in model["spec"].lower() for model in found)
    with pytest.raises(UserError, match="no model's name contains 'tinny'; did you mean 'tiny'"):
        run("models", "--filter", "tinny")

"""The files of `examples/`: those that need no network run, the others are read; no command in them is out of date."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from PIL import Image

import robustvlm as rv
from robustvlm.cli.main import app

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md")
PROGRAM: Any = typer.main.get_command(app)
_COMMAND = re.compile(r"(?:-m )?robustvlm ((?:attack|detect|evaluate)(?:[^\n`#\\]|\\\n)*)")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which is the current one."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in EXAMPLES.glob("*.py"):  # what an earlier test has imported is no longer where it was
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return tmp_path / "examples"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_lists_every_file() -> None:
    linked = re.findall(r"^\| \[(\S+)\]\(\1\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(linked) == FILES
    assert "](examples/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*FILES, "README.md"])
def test_commands_are_understood(name: str) -> None:
    found = _COMMAND.findall((EXAMPLES / name).read_text(encoding="utf-8"))
    assert found
    for text in found:
        words = shlex.split(text.replace("\\\n", " "))
        PROGRAM.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.usefixtures("place")
def test_own_model_and_own_attack_run() -> None:
    run = rv.attack(
        "own_model:load",
        attack="own_attack:Momentum:decay=0.5:steps=3",
        eps="8/255",
        limit=60,
        lanes=60,
        checks="none",
        device="cpu",
    )
    assert run.summary.images.evaluated == 60
    # It is a model and not noise: chance is 1 in 101.
    assert run.summary.clean_accuracy.successes >= 4
    assert run.summary.at("8/255").robust_accuracy.successes < run.summary.clean_accuracy.successes


@pytest.mark.usefixtures("place")
def test_own_score_runs_and_is_told_from_chance() -> None:
    run = rv.detect("tiny", scores="msp,own_score:agreement", fit="none", limit=40, draws=100, device="cpu")
    ours = next(found for found in run.summary.scores if "agreement" in found.name)
    assert max(at.auroc.value for at in ours.on) > 0.6


def test_the_model_of_transformers_runs_from_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="4.57")
    from tests.models.transformers_folders import make

    make(place / "clip", "clip")
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (place / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(place / "photos" / name / "1.png")
    loaded(place / "hf_model.py").main(str(place / "clip"), f"imagefolder:{place / 'photos'}", limit=2, steps=1)
    assert "still right under attack" in capsys.readouterr().out


def test_the_model_of_timm_runs_from_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    import torch

    from robustvlm.data import open_data

    names = open_data("emoji").class_names
    torch.save(timm.create_model("test_resnet", num_classes=len(names)).state_dict(), place / "mine.pt")
    (place / "classes.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    loaded(place / "timm_model.py").main("test_resnet/mine.pt", "emoji", limit=2, steps=1)
    assert "still right under attack" in capsys.readouterr().out


def test_the_gate_is_a_workflow_that_compares_the_lower_end() -> None:
    job = yaml.safe_load((EXAMPLES / "ci-gate.yml").read_text(encoding="utf-8"))["jobs"]["gate"]
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    commands = [shlex.split(line.partition(" >> ")[0]) for line in lines if line.startswith("robustvlm")]
    given, *reports = (PROGRAM.commands[words[1]].make_context(words[1], words[2:]).params for words in commands)
    assert given["fail_if"] == ["robust_accuracy.low<40%"] == reports[-1]["fail_if"]
    assert [told["runs"] for told in reports] == [[given["name"]]] * 2
    assert [told["form"] for told in reports] == ["md", "junit"]
    uploads = next(step["with"]["path"] for step in job["steps"] if "upload" in step.get("uses", ""))
    assert uploads.split() == [f"runs/{given['name']}", str(reports[-1]["out"])]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_job_is_a_script_that_bash_can_read() -> None:
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)

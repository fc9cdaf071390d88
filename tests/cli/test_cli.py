"""The program as a shell sees it: one line for every mistake, exit codes, clean JSON, and runs that survive a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from robustvlm import __version__
from robustvlm.cli.main import app, main

QUICK = ["--attack", "pgd:steps=2", "--limit", "6", "--lanes", "4", "--device", "cpu"]
ENCODER = """
import torch

class Mean:
    image_size, logit_scale = 8, 10.0

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) + 0.01

    def encode_text(self, texts):
        return torch.eye(3)[[0 if "red" in text else 2 for text in texts]]

class Coupled(Mean):
    def encode_image(self, pixels):
        return pixels.mean((2, 3)) * pixels.mean() if len(pixels) < 3 else pixels.mean((2, 3)) - pixels.mean((0, 2, 3))

class Detached(Mean):
    def encode_image(self, pixels):
        return super().encode_image(pixels.detach())

class Half:
    image_size = 8

class Ten:
    image_size = 8

    def forward(self, pixels):
        return pixels.mean((2, 3)).repeat(1, 4)[:, :10]
"""


class Ended(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder and a cache of the test's own; the handler that the program installs is taken away again."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["robustvlm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an encoder, pictures of two classes, and files with mistakes of many kinds."""
    monkeypatch.delitem(sys.modules, "own_encoders", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_encoders.py").write_text(ENCODER)
    for name, colour in (("red", (200, 40, 30)), ("blue", (30, 60, 180))):
        for root, count in (("photos", 4), ("corrupt", 0), ("no_images", 0)):
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (colour[0] - 9 * number, *colour[1:])).save(
                    tmp_path / root / name / f"{number}.png"
                )
        (tmp_path / "corrupt" / name / "0.png").write_bytes(b"no image")
    (tmp_path / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "red" / "0.png")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    texts = {
        "cycle.csv": "parent,child\nred,blue\nblue,red\n",
        "names1.txt": "red\n",
        "prompts.txt": "a photo\n",
        "file": "x",
        "broken.parquet": "PAR1",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


OWN = ["attack", "own_encoders:Mean", "--data", "imagefolder:photos", "--attack", "pgd:steps=2"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown model": (["attack", "tinny"], "unknown model 'tinny'; did you mean 'tiny'"),
    "unknown tag": (["attack", "ViT-B-32/laion2b_s34b_b79"], "did you mean 'laion2b_s34b_b79k'"),
    "architecture without weights": (["attack", "ViT-B-32"], "say which weights"),
    "missing checkpoint": (["attack", "ViT-B-32/best.safetensors"], "best.safetensors"),
    "missing module": (["attack", "no_such_module:Encoder"], "no module 'no_such_module'"),
    "missing callable": (["attack", "own_encoders:Meen"], "did you mean 'Mean'"),
    "incomplete encoder": (["attack", "own_encoders:Half", "--data", "imagefolder:photos"], "Half has no encode_image"),
    "encoder without gradient": (
        ["attack", "own_encoders:Detached", "--data", "imagefolder:photos"],
        "gives no gradient",
    ),
    "coupled encoder": (["attack", "own_encoders:Coupled", "--data", "imagefolder:photos"], "--lanes 1"),
    "missing folder": (["attack", "--data", "imagefolder:nowhere"], "no folder nowhere"),
    "missing file": (["attack", "--data", "parquet:nowhere.parquet"], "no file nowhere.parquet"),
    "empty folder": (["attack", "--data", "imagefolder:empty"], "empty holds nothing"),
    "folder without images": (["attack", "--data", "imagefolder:no_images"], "no image in them"),
    "only corrupt images": (["attack", "own_encoders:Mean", "--data", "imagefolder:corrupt"], "none of its 2 images"),
    "one class": (["attack", "own_encoders:Mean", "--data", "imagefolder:one"], "at least 2 classes"),
    "unknown kind of data": (["attack", "--data", "imgfolder:photos"], "did you mean 'imagefolder'"),
    "missing column": (["attack", "--data", "parquet:numbers.parquet"], "no image column"),
    "broken parquet": (["attack", "--data", "parquet:broken.parquet"], "not a readable Parquet file"),
    "unknown data option": (["attack", "--data", "emoji?spilt=test"], "did you mean 'split'"),
    "unlabelled data": (["attack", "--data", "emoji?split=near", "--limit", "2"], "attacks need labelled images"),
    "unknown goal": (["attack", "--goal", "misclasify"], "did you mean 'misclassify'"),
    "goal without its level": (["attack", "--goal", "superclass"], "pass superclass:LEVEL"),
    "unknown level": (["attack", "--goal", "superclass:7"], "levels 0 (classes) to 2 below its root, got 7"),
    "level without a tree": ([*OWN, "--goal", "superclass:1"], "has no class tree"),
    "unknown target": (["attack", "--goal", "targeted:dolpin"], "did you mean 'dolphin'"),
    "refusal of a model that never refuses": (["attack", "--goal", "deny"], "pass for example 'tiny+reject:0.5'"),
    "missing target picture": (["attack", "--goal", "feature:gone.png"], "no picture at 'gone.png'"),
    "cosine out of range": (["attack", "--goal", "feature", "--min-cos", "1.5"], "--min-cos must lie between"),
    "threshold that is no probability": (["attack", "tiny+reject:2"], "0 < T < 1"),
    "unknown images without refusal": (
        ["attack", "--goal", "intrude", "--limit", "2"],
        "needs a model that may refuse",
    ),
    "no draws": (["attack", "--eot", "0"], "--eot must be between 1 and"),
    "draws text": (["attack", "--draws", "many"], "Invalid value for '--draws'"),
    "classifier of other classes": (
        ["attack", "own_encoders:Ten", "--data", "imagefolder:photos"],
        "for 2 images and 2 classes",
    ),
    "eps zero": (["attack", "--eps", "0"], "eps must be a positive number"),
    "eps negative": (["attack", "--eps", "-1/255"], "eps '-1/255' is no number"),
    "eps text": (["attack", "--eps", "small"], "eps 'small' is no number"),
    "eps nan": (["attack", "--eps", "nan"], "eps must be a positive number"),
    "eps in grey levels": (["attack", "--eps", "8"], "for 8 grey levels pass 8/255"),
    "unknown norm": (["attack", "--norm", "L7"], "expected Linf or L2"),
    "unknown attack": (["attack", "--attack", "pgdd"], "did you mean 'pgd'"),
    "attack twice": (["attack", "--attack", "pgd,pgd"], "stands twice"),
    "unknown attack option": (["attack", "--attack", "pgd:stepps=3"], "unknown option 'stepps=3'"),
    "attack option without number": (["attack", "--attack", "pgd:steps=many"], "expected a whole number, got 'many'"),
    "no steps": (["attack", "--steps", "0"], "steps must be between 1 and"),
    "no images": (["attack", "--limit", "0"], "--limit must be at least 1"),
    "limit text": (["attack", "--limit", "few"], "Invalid value for '--limit'"),
    "no lanes": (["attack", "--lanes", "0"], "--lanes must be at least 1"),
    "negative seed": (["attack", "--seed", "-1"], "--seed must not be negative"),
    "unknown device": (["attack", "--device", "tpu"], "pass auto, cpu, cuda"),
    "device without data": (["attack", "--device", "meta"], "pass auto, cpu, cuda"),
    "missing device": (["attack", "--device", "cuda:99"], "is not there"),
    "unknown precision": (["attack", "--precision", "fp8"], "unknown precision 'fp8'"),
    "tiny resolution": (["attack", "--resolution", "4"], "between 8 and 4096"),
    "name that leads out": (["attack", "--name", "../x"], "the run name '../x' is not allowed"),
    "tree with a cycle": ([*OWN, "--tree", "cycle.csv"], "the tree has a cycle"),
    "missing tree": ([*OWN, "--tree", "nowhere.json"], "no tree file at nowhere.json"),
    "too few class names": ([*OWN, "--classes", "names1.txt"], "2 classes"),
    "template without place": ([*OWN, "--templates", "prompts.txt"], "lacks {}"),
    "nothing to resume": ([*OWN, "--resume"], "no run to resume"),
    "bad condition": ([*OWN, "--fail-if", "asr is high"], "cannot read the condition"),
    "condition never true": ([*OWN, "--fail-if", "asr>50"], "for per cent write asr>50%"),
    "output that is a file": ([*OWN, "--out", "file"], "choose another folder with --out"),
    "unknown option": (["attack", "--stepz", "3"], "--stepz"),
    "unknown command": (["atack"], "attack"),
    "surplus argument": (["attack", "tiny", "emoji"], "emoji"),
    "unknown run": (["report", "nothing"], "no run 'nothing'"),
    "folder that is no run": (["report", "photos"], "is no run folder"),
    "evaluate an unknown model": (["evaluate", "tinny"], "did you mean 'tiny'"),
    "unknown data to look at": (["data", "photos"], "did you mean 'imagefolder:photos'"),
    "unknown name of a model": (["models", "--filter", "tinny"], "did you mean 'tiny'"),
}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_ends_in_one_line(call: Call, kind: str) -> None:
    arguments, said = MISTAKES[kind]
    ended = call(*arguments)
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in ended.out + ended.err


def test_changed_settings_under_a_name_are_refused_by_key(call: Call, place: Path) -> None:
    assert call(*OWN, "--name", "mine").code == 0
    rows = (place / "runs" / "mine" / "results.parquet").read_bytes()
    ended = call(*OWN, "--name", "mine", "--seed", "5", "--eps", "1/255")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "seed: 0 -> 5" in ended.err
    assert "eps_text: ['2/255'] -> ['1/255']" in ended.err
    assert (place / "runs" / "mine" / "results.parquet").read_bytes() == rows
    assert call(*OWN, "--name", "mine", "--seed", "5", "--fresh").code == 0


def test_json_is_all_that_standard_output_holds(call: Call, place: Path) -> None:
    first = call(*OWN, "--json", "--name", "j")
    assert first.code == 0
    summary = json.loads(first.out)
    assert summary["images"]["evaluated"] == 8
    assert summary == json.loads((place / "runs" / "j" / "summary.json").read_text())
    assert json.loads(call(*OWN, "--json", "--name", "j").out) == summary
    assert "<html" in (place / "runs" / "j" / "report.html").read_text().lower()


@pytest.mark.usefixtures("place")
def test_conditions_decide_the_exit_code(call: Call) -> None:
    named = [*OWN, "--name", "gate"]
    assert call(*named, "--fail-if", "clean_accuracy<1%").code == 0
    ended = call(*named, "--fail-if", "clean_accuracy>=0", "--fail-if", "asr>=0%", "--fail-if", "robust_accuracy<0")
    assert ended.code == 1
    assert ended.err == "failed: clean_accuracy>=0, asr>=0%\n"
    assert "attack success rate" in ended.out.lower()


def test_names_that_look_like_markup_are_printed_as_they_are(call: Call, place: Path) -> None:
    (place / "photos").rename(place / "[bold]photos[red]")
    ended = call("attack", "own_encoders:Mean", "--data", "imagefolder:[bold]photos[red]", *QUICK, "--out", "[i]runs")
    assert ended.code == 0
    assert "[i]runs" in ended.out
    assert (place / "[i]runs").is_dir()


def test_version_and_help(call: Call) -> None:
    assert call("--version") == Ended(0, f"robustvlm {__version__}\n", "")
    for name in ["", *(command.name or "" for command in app.registered_commands)]:
        ended = call(*filter(None, [name]), "--help")
        assert ended.code == 0
        assert ended.err == ""
        assert f" {name}" in next(line for line in ended.out.splitlines() if "Usage: " in line)
    assert "Usage: " in call().out


def test_the_module_can_be_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "robustvlm", "--version"],
        capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout == f"robustvlm {__version__}\n"
    assert " torch\n" not in done.stderr, "--version must not wait for the heavy libraries"


# Real processes, real signals

EMOJI = ["attack", "--attack", "pgd:steps=20", "--eps", "1/255", "--limit", "24", "--lanes", "8", "--device", "cpu"]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "robustvlm", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed_interrupts,
    )  # fmt: skip


def heed_interrupts() -> None:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_lines(process: subprocess.Popen[str], journal: Path, count: int) -> None:
    """Return as soon as the journal has `count` lines."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"no {count} lines: {process.communicate()}")


def rows_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "results.parquet").drop_columns(["seconds"])


@pytest.fixture
def straight(call: Call, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run on the bundled model and data."""
    assert call(*EMOJI, "--name", "straight").code == 0
    return tmp_path / "runs" / "straight"


def test_killed_and_repeated_a_run_ends_as_if_nothing_had_happened(call: Call, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "killed"
    lines = random.randrange(1, 36)
    process = start(*EMOJI, "--name", "killed")
    wait_for_lines(process, folder / "journal.jsonl", lines)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "results.parquet").exists()
    assert call(*EMOJI, "--name", "killed").code == 0
    assert rows_of(folder).equals(rows_of(straight)), f"killed after {lines} lines"
    shown = [{path.name: load_file(path) for path in (run / "gallery").iterdir()} for run in (folder, straight)]
    assert shown[0].keys() == shown[1].keys()
    for name, tensors in shown[0].items():
        assert all(tensors[key].equal(shown[1][name][key]) for key in ("clean", "adversarial"))


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_a_run_says_how_to_go_on(call: Call, tmp_path: Path, signal_number: signal.Signals) -> None:
    process = start(*EMOJI, "--name", "stopped")
    wait_for_lines(process, tmp_path / "runs" / "stopped" / "journal.jsonl", 20)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("stopped; everything so far is kept in ")
    assert "repeat the command to go on" in err
    assert "Traceback" not in err
    if signal_number == signal.SIGINT:
        assert call(*EMOJI, "--name", "stopped", "--resume").code == 0

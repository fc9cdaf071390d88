"""Purify runs from start to end: models that are runs, resumed to the bit, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from robustvlm.commands.purify import PURIFY, PurifySettings
from robustvlm.defenses import SmoothedVLM, load_classifier, load_pipeline
from robustvlm.defenses.purify import PurifiedVLM
from robustvlm.errors import UserError
from robustvlm.models.saved import read_card
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer

ENCODER = "small_encoders:Encoder"
OWN = """
def shrink():
    return lambda noisy, sigma: noisy / (1 + sigma**2)
"""


@pytest.fixture
def prepare(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    photos = make_folder()

    def make(name: str = "run", model: str = ENCODER, **settings: Any) -> Run:
        few = {"batch_size": 8, "val_limit": 3, "sigma": [0.25, 0.5]}
        few |= {} if settings.get("only") == "mapper" or "denoiser" in settings else {"steps": 6}
        few |= {} if settings.get("only") == "purifier" else {"mapper_steps": 5}
        place = {"out": tmp_path / "runs", "name": name, "checkpoint_every": 1}
        given = {"model": model, "data": f"imagefolder:{photos}"} | few | place | settings
        return Run(PURIFY, PurifySettings(**given))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in ("purifier", "mapper")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def test_a_run_is_a_model_with_a_record_and_a_report(prepare: Callable[..., Run]) -> None:
    prepared = prepare()
    summary = prepared.start().summary
    folder = prepared.folder.path
    card = read_card(folder)
    assert card is not None
    assert (card.kind, card.base, card.settings["sigma"]) == ("purify", ENCODER, [0.25, 0.5])
    vlm = load_pipeline(f"{folder}+smooth:0.25:4")
    assert isinstance(vlm, SmoothedVLM)
    assert isinstance(vlm.base, PurifiedVLM)
    assert vlm.base.purifier is not None
    assert vlm.base.mapper is not None
    assert load_classifier(str(folder), ["cat", "dog"], ["{}"], cache=False)(torch.rand(2, 3, 16, 16)).shape == (2, 2)
    assert (summary.method, summary.steps, summary.history.steps[-1].step) == ("purifier and mapper", 11, 11)
    assert summary.history.validations[0].step == 0
    assert {"purifier diffusion", "purifier feature", "purifier pixel"} <= summary.history.steps[0].terms.keys()
    assert {"mapper similarity", "mapper statistics"} <= summary.history.steps[-1].terms.keys()
    assert (
        summary.trained_parameters
        == summary.settings["parameters"]["purifier"] + summary.settings["parameters"]["mapper"]
    )
    page = prepared.folder.report_path.read_text()
    assert "score at 0.25" in page
    assert "chose nothing: the weights of the last step were kept" in page
    assert "which chose the weights" not in page
    assert (summary.best_by, summary.watched, summary.history.best_step) == (None, "score at 0.5", None)


def test_a_finished_run_is_not_trained_again(prepare: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(only="mapper").start()
    monkeypatch.setattr("robustvlm.defenses.purify.train.train_parts", lambda *_, **__: pytest.fail("trained"))
    assert prepare(only="mapper").start() == first
    with pytest.raises(UserError, match=r"mapper_steps: 5 -> 6.*--fresh"):
        prepare(only="mapper", mapper_steps=6).start()


class Killer(Observer):
    """Stops the run like Ctrl-C after the third step of one stage."""

    def __init__(self, stage: str) -> None:
        self.stage, self.now, self.steps = stage, "", 0

    def say(self, line: str) -> None:
        if line in ("The purifier:", "The mapper:"):
            self.now = line[4:-1]

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        del title, total
        self.steps = done

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.steps += count
        if (self.now, self.steps) == (self.stage, 3):
            raise KeyboardInterrupt


@pytest.mark.equality
@pytest.mark.parametrize("stage", ["purifier", "mapper"])
def test_killed_and_resumed_equals_straight(prepare: Callable[..., Run], stage: str) -> None:
    straight = prepare("straight")
    straight.start()
    with pytest.raises(KeyboardInterrupt):
        prepare("killed").start(Killer(stage))
    assert read_card(prepare("killed").folder.path) is None  # not a model yet
    again = prepare("killed")
    again.start(resume=True)
    wanted, found = weights(straight.folder.path), weights(again.folder.path)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_training_does_not_depend_on_how_the_batch_is_cut(prepare: Callable[..., Run]) -> None:
    whole, parts = prepare("whole", only="purifier"), prepare("parts", only="purifier", accumulate=2)
    whole.start()
    parts.start()
    one, two = (load_file(run.folder.path / "purifier.safetensors") for run in (whole, parts))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


@pytest.mark.equality
@pytest.mark.slow
def test_two_ranks_train_what_one_would(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    photos = make_folder()
    few = [
        "--steps",
        "6",
        "--mapper-steps",
        "5",
        "--batch-size",
        "8",
        "--val-limit",
        "3",
        "--sigma",
        "0.25",
        "--validate-every",
        "0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for ranks in (1, 2):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks > 1 else []
        command = [sys.executable, *several, "-m", "robustvlm", "purify", ENCODER, "--data", f"imagefolder:{photos}"]
        where = ["--out", str(tmp_path / "runs"), "--name", f"ranks-{ranks}"]
        subprocess.run([*command, *few, *where], cwd=Path(__file__).parent, env=environment, check=True, timeout=300)
    one, two = (weights(tmp_path / "runs" / f"ranks-{ranks}") for ranks in (1, 2))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_parts_of_one_image_are_taken_where_no_statistic_is_asked_of_them(prepare: Callable[..., Run]) -> None:
    assert prepare("purifier", only="purifier", batch_size=1).work.stages.purifier.batch_size == 1
    plain = prepare("mapper", only="mapper", batch_size=1, mapper_steps=1, statistics_weight=0.0)
    assert plain.start().summary.steps == 1


def test_the_stages_can_be_made_one_after_the_other(prepare: Callable[..., Run]) -> None:
    first = prepare("first", only="purifier")
    first.start()
    second = prepare("second", model=str(first.folder.path), only="mapper")
    assert second.start().summary.method == "mapper"
    vlm = load_pipeline(str(second.folder.path)).at_noise(0.25)
    assert isinstance(vlm, PurifiedVLM)
    assert isinstance(vlm.base, PurifiedVLM)
    assert (vlm.purifier, vlm.base.sigma) == (None, 0.25)
    assert vlm.base.purifier is not None
    with pytest.raises(UserError, match=r"has a purifier already: pass --only mapper"):
        prepare("third", model=str(first.folder.path))


def test_a_denoiser_of_the_user_gets_a_mapper_or_stands_alone(
    prepare: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "purify_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    run = prepare(denoiser="purify_own:shrink")
    assert run.start().summary.method == "mapper"
    vlm = load_pipeline(str(run.folder.path))
    assert isinstance(vlm, PurifiedVLM)
    assert vlm.purifier is not None
    with pytest.raises(UserError, match="needs no training"):
        prepare("alone", denoiser="purify_own:shrink", only="purifier")


def test_another_denoiser_of_the_same_name_makes_another_run(
    prepare: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "purify_own.py"
    source.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first = prepare(denoiser="purify_own:shrink")
    first.start()
    unnamed = prepare(None, denoiser="purify_own:shrink").folder.name  # type: ignore[arg-type]
    source.write_text(OWN.replace("1 + sigma", "2 + sigma"))
    monkeypatch.delitem(sys.modules, "purify_own")
    with pytest.raises(UserError, match=r"no longer the one .* run `robustvlm purify` again"):
        load_pipeline(str(first.folder.path))
    with pytest.raises(UserError, match=r"model denoiser: .* -> .*--fresh"):
        prepare(denoiser="purify_own:shrink").start()
    again = prepare(denoiser="purify_own:shrink")
    again.start(fresh=True)
    assert load_pipeline(str(again.folder.path)).fingerprint
    assert prepare(None, denoiser="purify_own:shrink").folder.name != unnamed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"only": "purify"}, "did you mean 'purifier'"),
        ({"sigma": [0.0]}, "sigma must be above 0"),
        ({"size": "huge"}, "unknown purifier size"),
        ({"feature_weight": -1.0}, "feature_weight must be at least 0, got -1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"limit": 1}, "limit must be at least 2 images, got 1"),
        ({"val_limit": 0}, "val_limit must be at least 1 image, got 0"),
        ({"augment": "cropp"}, "did you mean 'crop'"),
        ({"model": f"{ENCODER}+smooth:0.25"}, "is smoothed already: purify 'small_encoders:Encoder'"),
        ({"denoiser": "blur"}, "module:callable"),
        ({"limit": 5}, "too small"),
        (
            {"data": "emoji?split=train", "val_limit": 3},
            "groups of 4 or more, .* pass val_limit=4 or more, or val=DATA",
        ),
        ({"only": "mapper", "steps": 6}, "steps is for training a purifier, and none is trained here: leave it out"),
        ({"only": "mapper", "feature_weight": 1.0}, "feature_weight is for training a purifier"),
        ({"denoiser": "blur:blur", "size": "small"}, "size is for training a purifier"),
        ({"only": "purifier", "mapper_lr": 0.1}, "mapper_lr is for training a mapper"),
        ({"batch_size": 1}, "statistics_weight is of mean and spread .* hold one: pass a larger batch_size"),
        ({"batch_size": 2, "accumulate": 2, "only": "mapper"}, "statistics_weight=0"),
        (
            {"data": "emoji?copies=1", "val": "emoji?copies=2", "val_limit": 900},
            "278 images of --val .* trained on, or",
        ),
    ],
)
def test_mistakes_are_found_and_explained_in_one_line(
    prepare: Callable[..., Run], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        prepare(**settings).start()
    assert "\n" not in str(caught.value)

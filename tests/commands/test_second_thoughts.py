"""What a command is told that it cannot do, and what it had made before, when it is told so too late."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import robustvlm as rv
from robustvlm.commands.certify import CertifySettings
from robustvlm.commands.detect.encoding import Answers
from robustvlm.defenses import load_classifier


def test_a_pipeline_that_cannot_be_built_again_is_still_there(tmp_path: Path) -> None:
    encoder = rv.soup(["tiny", "tiny"], out=tmp_path, name="parent", device="cpu").folder
    made = rv.build(str(encoder), smooth="0.25:4", out=tmp_path, name="whole", device="cpu").folder
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file() and path.name != "run.lock"}
    shutil.move(encoder, tmp_path / "elsewhere")
    with pytest.raises(rv.UserError):
        rv.build(str(encoder), smooth="0.25:4", out=tmp_path, name="whole", device="cpu")
    assert {path: path.read_bytes() for path in before} == before
    assert rv.open_run(made).name == "whole"


def test_a_build_that_fails_at_its_last_step_gives_the_earlier_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rv.build("tiny", smooth="0.25:4", out=tmp_path, name="whole", device="cpu").folder
    card, record = (made / "model.json").read_bytes(), (made / "summary.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("robustvlm.commands.assemble.work.write_text", full)
        with pytest.raises(OSError, match="no space"):
            rv.build("tiny", smooth="0.25:4", out=tmp_path, name="whole", device="cpu")
    assert ((made / "model.json").read_bytes(), (made / "summary.json").read_bytes()) == (card, record)
    assert rv.open_run(made).summary.parts == ["encoder tiny", "smoothing 0.25:4"]
    assert not (made / ".before").exists()


@pytest.mark.parametrize("options", [{"encoder": "nosuch"}, {"encoder": "tiny", "purify": "nowhere"}])
def test_a_recipe_that_cannot_be_made_leaves_no_folder(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(rv.UserError):
        rv.build(**options, smooth="0.25", out=tmp_path, device="cpu")
    with pytest.raises(rv.UserError, match="unknown purifier size"):
        rv.purify("tiny", size="x", out=tmp_path, device="cpu", limit=40, val_limit=4)
    for wrong, said in (
        ({"inner_steps": 2}, "inner_steps has no effect without eps"),
        ({"eps": "1/255", "inner_steps": 0}, "at least 1 step"),
        ({"eps": "1/255", "feature_weight": 0.0}, "nothing to raise"),
        ({"eps": "1/255", "only": "mapper"}, "for training a purifier, and none is trained"),
        ({"text_weight": 1.0, "only": "mapper"}, "for training a purifier, and none is trained"),
    ):
        with pytest.raises(rv.UserError, match=said):
            rv.purify("tiny", out=tmp_path, device="cpu", limit=40, val_limit=4, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_smoothed_model_is_evaluated_alike_twice(tmp_path: Path) -> None:
    asked = {"limit": 24, "device": "cpu", "out": tmp_path}
    first, again = (rv.evaluate("tiny+smooth:0.1:2", name=name, **asked).summary for name in ("first", "again"))
    assert first.model_copy(update={"seconds": 0.0}) == again.model_copy(update={"seconds": 0.0})
    state = torch.get_rng_state()
    rv.evaluate("tiny+smooth:0.1:2", **(asked | {"limit": 2}))
    assert torch.equal(torch.get_rng_state(), state), "the caller's own draws go on as they would"


@pytest.mark.parametrize("option", [{"sigma": 9.0}, {"samples": 77}, {"claim": "vote"}, {"data": "emoji?split=near"}])
def test_an_audit_refuses_what_stands_in_the_run(option: dict[str, object]) -> None:
    with pytest.raises(rv.UserError, match=f"{next(iter(option))} is not for audit"):
        CertifySettings(audit="runs/x", **option)
    assert CertifySettings(audit="runs/x", limit=3, seed=2, device="cpu").limit == 3


def test_a_size_that_memory_forces_is_tried_out_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Answers(load_classifier("tiny", ["apple", "dog"], ["{}"], device="cpu"), batch_size=8)
    images, questions = torch.rand(8, 3, 64, 64), []
    answers.batch(images.shape[1:])
    answers._sizes = (8,)  # of a model that only its full batch suits
    ask, asked = Answers._ask, Answers._question

    def scarce(self: Answers, pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if len(pixels) > 4:
            raise MemoryError
        return ask(self, pixels)

    def noted(self: Answers, noise: torch.Tensor) -> None:
        questions.append(len(noise))
        asked(self, noise)

    monkeypatch.setattr(Answers, "_ask", scarce)
    monkeypatch.setattr(Answers, "_question", noted)
    features, _ = answers(images)
    assert questions == [4]
    assert features is not None
    assert len(features) == 8


def test_a_radius_may_be_a_number(tmp_path: Path) -> None:
    short = {"limit": 6, "draws": 100, "scores": "mcm", "fit": "none", "attack_limit": 2, "attack": "pgd:steps=1"}
    run = rv.detect("tiny", under_attack=True, eps=0.01, out=tmp_path, device="cpu", **short)
    assert run.manifest["config"]["under_attack"]["eps"] == 0.01

"""`robustvlm judge` on a linear classifier whose robust images are known by hand, with defences planted around it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import robustvlm as rv
from robustvlm.attacks.perturb import perturb
from robustvlm.commands.index import entries
from robustvlm.commands.judge import JUDGE, JudgeSettings
from robustvlm.commands.judge.attacks import FEATURE, MODE, SHORT, TARGETED, UNAWARE
from robustvlm.commands.judge.paper import table_of_defences, write_markdown
from robustvlm.commands.judge.record import Judgement, ModelJudgement, as_read, compared_checks
from robustvlm.commands.judge.view import (
    act_words,
    bars_of,
    claim_words,
    intervals_of,
    left_aside,
    reproduction,
    sentence_of,
)
from robustvlm.core.files import read_json
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.zoo.base import DEFENCES, Claim
from robustvlm.defenses.zoo.wrap import counted_passes
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.report.page import write_page
from robustvlm.runs.manifest import FILES
from robustvlm.runs.records import Check
from robustvlm.runs.run import Run
from robustvlm.runs.settings import Observer
from robustvlm.stats import mcnemar_exact, rate

MODULE = '''
import torch
from torch import nn


class Channels(nn.Module):
    """Three classes, the brightest channel of the image; the gradient may be turned round."""

    image_size = 16
    class_names = ("a red", "b green", "c blue")

    def __init__(self, honest=True):
        super().__init__()
        self.honest = honest

    def forward(self, pixels):
        logits = 30 * pixels.mean((2, 3))
        return logits if self.honest else 2 * logits.detach() - logits


def plain():
    return Channels()


def masked():
    return Channels(honest=False)


class Levels(nn.Module):
    differentiable = False

    def forward(self, pixels):
        return (pixels * 31).round() / 31


def stairs():
    model = nn.Sequential(Levels(), Channels())
    model.image_size, model.class_names = 16, Channels.class_names
    return model


def smaller():
    model = Channels()
    model.image_size = 8
    return model


class Told(Channels):
    def forward(self, pixels):
        with open("gain.txt") as file:
            return float(file.read()) * super().forward(pixels)


def told():
    return Told()
'''
# Levels by which the right channel is brighter: an attack of 4 levels closes a gap below 8, and no other.
GAPS = (4, 6, 12, 20)
MODELS = "planted:plain+bits:8,planted:plain+vote:3,planted:plain+tapt"
OPTIONS: dict[str, Any] = {"eps": "4/255", "steps": 4, "queries": 8, "lanes": 4, "device": "cpu", "draws": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images and models, and the process in it."""
    folder = tmp_path_factory.mktemp("judge")
    for place, name in enumerate(("a red", "b green", "c blue")):
        (folder / "images" / name).mkdir(parents=True)
        for gap in GAPS:
            colour = [120, 120, 120]
            colour[place] += gap
            Image.new("RGB", (16, 16), tuple(colour)).save(folder / "images" / name / f"{gap}.png")
    (folder / "planted.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("planted", None)


def judge(place: Path, model: str, name: str, **options: Any) -> Any:
    data = f"imagefolder:{place / 'images'}"
    return rv.judge(model, data=data, out=place / "runs", name=name, **(OPTIONS | options))


@pytest.fixture(scope="module")
def run(place: Path) -> Any:
    return judge(place, MODELS, "whole")


def names(found: ModelJudgement) -> set[str]:
    return {check.name for check in found.checks if check.level in ("warning", "fault")}


def test_the_undefended_model_is_what_it_is_by_hand(run: Any) -> None:
    base = run.summary.of("planted:plain")
    assert base.clean.successes == base.clean.total == 12
    assert base.worst.successes == base.adaptive.successes == 6
    assert {rate.successes for rate in base.unaware.values()} == {6}
    assert base.facts.base is None
    assert base.gain is None
    held = {image.id for image in base.images if image.held}
    assert held == {image.id for image in base.images if int(Path(image.id).stem) > 8}


def test_copies_of_one_drawing_count_once_in_intervals(place: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.data.source.DataSource.group", lambda _, name: Path(name).stem)
    copies = judge(place, "planted:plain+bits:8", "copies").summary
    worst, each = copies.of("planted:plain").worst, run.summary.of("planted:plain").worst
    assert (copies.worth, run.summary.worth) == (4, 12)
    assert (worst.successes, worst.total) == (each.successes, each.total) == (6, 12)
    assert (worst.low, worst.high) == pytest.approx((rate(2, 4).low, rate(2, 4).high))
    assert as_read(copies).of("planted:plain").adaptive.low == pytest.approx(worst.low)
    for one in copies.models:
        assert one.protocol.things is not None
        assert (one.gain is None) == (one.facts.base is None)
        assert one.gain is None or one.gain.things is not None
    alone = copies.model_copy(
        update={
            "models": [
                one.model_copy(update={"protocol": one.protocol.model_copy(update={"things": None})})
                for one in copies.models
            ]
        }
    )
    assert "copies of one thing count once, and each on its own in p" in intervals_of(alone)
    assert "of 4 images: copies of one thing count once, in p as well" in intervals_of(copies)
    assert "copies" not in intervals_of(run.summary.model_copy(update={"worth": None}))


def test_a_sound_defence_is_not_slandered_and_a_harmless_one_gains_nothing(run: Any) -> None:
    base, harmless = run.summary.of("planted:plain"), run.summary.of("planted:plain+bits:8")
    assert [image.held for image in harmless.images] == [image.held for image in base.images]
    assert harmless.gain.only_first == harmless.gain.only_second == 0
    assert harmless.gain_p == 1
    assert harmless.facts.forward == 1
    assert harmless.facts.modes == ["identity"]
    assert not {"transfer against gradients", "black box against white box", "robust above clean"} & names(harmless)


def test_nothing_is_credited_with_more_than_any_attack_leaves(run: Any) -> None:
    for found in run.summary.models:
        unaware = min(found.clean.successes, *(rate.successes for rate in (*found.unaware.values(), found.own_label)))
        assert found.worst.successes <= found.adaptive.successes <= unaware
        for image in found.images:
            assert image.held == all(image.right.values())
    vote = run.summary.of("planted:plain+vote:3")
    assert vote.facts.random
    assert (vote.facts.eot, vote.facts.draws, vote.facts.forward) == (4, 5, 3)
    assert vote.worst.successes == 6, "crops of a plain image are the image"


def test_what_is_left_of_a_random_model_meets_gradients_of_more_draws(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[int]] = {}

    def watched(model: Any, *args: Any, attack: Any, eot: int, **more: Any) -> Any:
        kind = attack if isinstance(attack, str) else attack[0].name
        asked.setdefault(kind, set()).add(eot)
        return perturb(model, *args, attack=attack, eot=eot, **more)

    monkeypatch.setattr("robustvlm.commands.judge.attacks.perturb", watched)
    vote = judge(place, "planted:plain+vote:3", "finer", queries=0, steps=4).summary.of("planted:plain+vote:3")
    assert asked.pop("pgd-from") == {1, 16}, "of the undefended model and of the vote, four times the four it declares"
    assert set.union(*asked.values()) == {1, 4}
    assert vote.facts.eot == 4
    asked.clear()
    judge(place, "planted:plain+vote:3", "as-asked", queries=0, steps=4, eot=2)
    assert set.union(*asked.values()) == {1, 2}, "a number that was asked for is kept to"


def test_masked_gradients_are_seen_through_and_said(place: Path) -> None:
    found = judge(place, "planted:masked", "masked", base="planted:plain").summary.of("planted:masked")
    through = [act.name for act in found.acts if act.name.startswith((MODE, SHORT))]
    assert all(image.held_in(through) for image in found.images), "the gradient leads the wrong way"
    assert found.adaptive.successes == found.worst.successes == 6, "the transferred points do not ask it"
    assert {"transfer against gradients", "does nothing here"} <= names(found)
    assert found.protocol.only_first == 0


def test_a_part_of_ones_own_that_says_it_has_no_gradient_is_not_told_to_say_so(place: Path) -> None:
    found = judge(place, "planted:stairs", "stairs", base="planted:plain").summary.of("planted:stairs")
    (said,) = (check for check in found.checks if check.name == "gradient as stated")
    assert said.level == "note"
    assert "as is to be expected of a model with parts that are declared" in said.message


def test_a_stopped_run_goes_on_and_ends_with_the_same(place: Path, run: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        judge(place, MODELS, "stopped", observer=Stop(12))
    journal = (place / "runs" / "stopped" / "journal.jsonl").read_text().splitlines()
    again = judge(place, MODELS, "stopped")
    assert (place / "runs" / "stopped" / "journal.jsonl").read_text().splitlines()[: len(journal)] == journal
    assert without_time(again.summary) == without_time(run.summary)


class Stop(Observer):
    """Ends a run after so many looks at parts of the images."""

    def __init__(self, left: int) -> None:
        self.left = left

    def advance(self, count: int = 1, **shown: str) -> None:
        del count, shown
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_points_are_gone_on_with_by_the_run_that_made_them_alone(place: Path) -> None:
    def again(name: str, **options: Any) -> Any:
        return judge(place, "planted:plain+bits:8", name, limit=4, queries=0, **options)

    whole, folder = again("points-whole"), place / "runs" / "points" / "adversarial"
    with pytest.raises(KeyboardInterrupt):
        again("points", observer=Stop(8))
    own = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert own
    for name in own:
        shutil.copy(whole.folder / "adversarial" / name, folder / name)
    with pytest.raises(UserError, match=r"\.safetensors' is another run's"):
        again("points")
    for name in own:
        (folder / name).write_bytes(own[name][:20])
    with pytest.raises(UserError, match=r"cannot read the kept points '.*: delete it, the run makes it again"):
        again("points")
    for name in own:  # as an earlier version wrote them, and no points of this model
        about = {"model": "planted:plain", "act": next(iter(UNAWARE))}
        (folder / name).write_bytes(save({"points": torch.zeros(4, 3, 16, 16)}, metadata=about))
    for found in again("points").summary.models:
        assert found.images == whole.summary.of(found.spec).images
    for name in own:
        assert torch.equal(load((folder / name).read_bytes())["points"], load(own[name])["points"])


def test_a_model_that_answers_otherwise_is_not_gone_on_with(place: Path) -> None:
    model = "planted:plain+bits:8,planted:told+bits:8"
    (place / "gain.txt").write_text("1")
    judge(place, model, "told", limit=2, queries=0, steps=1)
    (place / "gain.txt").write_text("2")
    with pytest.raises(UserError, match=r"outputs \(planted:told\) of fixed inputs differ"):
        judge(place, model, "told", limit=2, queries=0, steps=1)


def without_time(summary: Judgement) -> dict[str, Any]:
    return summary.model_copy(update={"seconds": 0.0}).model_dump()


def test_a_finished_run_is_read_and_told(place: Path, run: Any) -> None:
    again = rv.open_run(place / "runs" / "whole")
    assert again.summary == run.summary
    page, marked = run.report.read_text(), (run.folder / "report.md").read_text()
    assert page.count('<svg class="chart"') == 3
    for text in (page, marked):
        assert "our re-implementation" in text
        assert "Under attacks made on the undefended model, as in the papers" in text
        assert not re.search(r"\b(broken|fake|fails|useless|wrongly)\b", text, re.IGNORECASE)
    table = (run.folder / "report.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3 + 1
    assert {line.replace(r"\&", "").count("&") for line in rows} == {9}
    assert "planted:plain+tapt & ---" in table
    assert r"95\%" in table
    assert not re.search(r"(?<!\\)[#_%](?!.*booktabs)", table)
    assert read_json(run.folder / "summary.json", advice="")["models"][0]["spec"] == "planted:plain"
    for found in run.summary.models:
        assert [name for name, *_ in bars_of(found, run.summary)] == ["unaware", "adaptive", "worst"]
        if found.facts.base is not None:
            assert f"{found.worst.successes} of 12" in sentence_of(found, run.summary)


def test_in_a_list_of_runs_it_is_known_by_the_best_defence_and_not_by_what_it_is_compared_with(
    place: Path, run: Any
) -> None:
    (found,) = (entry for entry in entries(place / "runs") if entry.name == run.name)
    assert found.headline is not None
    defended = [model.spec for model in run.summary.models if model.facts.base is not None]
    assert found.headline.what in [f"robust, {spec}" for spec in defended]
    assert found.headline.value == max(run.summary.of(spec).worst.value for spec in defended)


def test_every_file_of_it_is_known_as_one_of_a_run(run: Any) -> None:
    own = {path.name for path in run.folder.iterdir()} - {"run.lock", "journal.jsonl"}
    assert own <= FILES.keys()
    for name in ("report.md", "report.tex"):
        path = run.folder / name
        write_page(path, path.read_text())
    with pytest.raises(UserError, match="is a file of the run itself"):
        write_page(run.folder / "summary.json", "")


def test_what_cannot_be_run_is_a_row_with_its_reason(run: Any) -> None:
    [row] = run.summary.not_reproduced
    assert (row.spec, row.title.split(",")[0]) == ("planted:plain+tapt", "TAPT")
    for name in ("report.md", "report.tex", "report.html"):
        text = (run.folder / name).read_text()
        assert "not reproduced" in text.lower()
        assert "not public" in text
    for spec in ("tiny+tapt", "tiny+aom"):
        with pytest.raises(rv.UserError, match="cannot be run"):
            load_pipeline(spec)


def test_passes_are_counted_at_the_encoder(run: Any) -> None:
    for spec, draws, views in (("planted:plain+bits:8", (1, 1), 1), ("planted:plain+vote:3", (3, 5), 3)):
        for act in run.summary.of(spec).acts[:3]:
            assert act.tried == 12
            assert 12 * views * draws[0] <= act.forward <= 12 * views * draws[1]
            assert act.backward == 0


def test_points_with_the_models_own_word_for_a_label(run: Any) -> None:
    """The undefended model is right on every image, so that its word is the label."""
    for found in run.summary.models:
        assert found.own_label == found.unaware["unaware:pgd"]
        assert all(image.right["label:pgd"] == image.right["unaware:pgd"] for image in found.images)


def test_images_leave_at_the_first_mode_that_fools_them_and_the_worst_case_is_the_same(place: Path) -> None:
    model = "planted:plain+jpeg:95"
    brief, whole = (
        judge(place, model, f"every-{every}", every_mode=every, queries=0).summary.of(model) for every in (False, True)
    )
    assert [image.held for image in brief.images] == [image.held for image in whole.images]
    assert (brief.worst, brief.adaptive) == (whole.worst, whole.adaptive)
    second = [next(act for act in found.acts if act.name == "mode:identity") for found in (brief, whole)]
    assert second[0].tried < second[1].tried == whole.clean.successes
    assert second[0].alone is None
    assert second[1].alone is not None
    assert sum(act.forward for act in brief.acts) < sum(act.forward for act in whole.acts)


@pytest.mark.equality
def test_two_processes_find_what_one_does(place: Path, run: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "robustvlm"]
    command += ["judge", MODELS, f"--data=imagefolder:{place / 'images'}", f"--out={place / 'runs'}", "--name=two"]
    command += [f"--{name}={value}" for name, value in OPTIONS.items()]
    paths = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    settings = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=900, cwd=place)
    assert done.returncode == 0, done.stderr
    assert without_time(rv.open_run(place / "runs" / "two").summary) == without_time(run.summary)
    kinds = [
        [line for line in path.read_text().splitlines() if '"kind":"part"' in line]
        for path in sorted((place / "runs" / "two").glob("journal*.jsonl"))
    ]
    assert len(kinds) == 2
    assert all(kinds)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("planted:plain", {}, "has no defence to judge"),
        ("planted:plain+nope", {}, "unknown operator"),
        ("planted:plain+bits:3,planted:plain+bits:3", {}, "twice"),
        ("planted:plain+bits:3,", {}, "an empty model"),
        ("planted:plain+bits:3+reject:0.5", {}, "judge compares models that always answer"),
        ("planted:smaller", {"base": "planted:plain"}, "takes images in another way"),
        ("planted:plain+fpt,planted:plain+aom", {}, "names no defence that can be run"),
        ("planted:plain+aom:0.1", {}, "must be written .aom:SIGMA:DRAWS:PULL"),
    ],
)
def test_mistakes_end_in_one_line(place: Path, model: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(rv.UserError, match=said):
        judge(place, model, "wrong", **options)
    assert not (place / "runs" / "wrong").exists()


def test_the_radius_where_none_is_given_is_one_of_the_norm(place: Path) -> None:
    for norm, text in (("Linf", "4/255"), ("L2", "0.5")):
        asked = JudgeSettings(
            model="planted:plain+bits:3", data=f"imagefolder:{place / 'images'}", norm=norm, limit=2, device="cpu"
        )
        assert Run(JUDGE, asked).manifest["config"]["eps_text"] == text


def test_images_that_are_in_no_figure_are_told(run: Any) -> None:
    assert left_aside(run.summary) == ""
    some = run.summary.model_copy(update={"unreadable": 1, "unknown": 2})
    assert left_aside(some) == "Left out of every figure: 1 image unreadable, 2 images of no known class."
    write_markdown(run.folder / "other.md", some, {})
    assert "1 image unreadable" in (run.folder / "other.md").read_text(encoding="utf-8")
    (run.folder / "other.md").unlink()


def test_names_from_outside_are_no_markdown(run: Any, tmp_path: Path) -> None:
    *first, last = run.summary.models
    odd = last.model_copy(update={"checks": [Check(name="<img src=x>", level="warning", message="a*b* `c`")]})
    write_markdown(
        tmp_path / "odd.md", run.summary.model_copy(update={"models": [*first, odd]}), {"data": {"spec": "a`<b>`"}}
    )
    told = (tmp_path / "odd.md").read_text(encoding="utf-8")
    assert "images of `a'<b>'`" in told
    assert "* \\<img src=x\\>: a\\*b\\* \\`c\\`" in told


def test_fewer_and_longer_steps_are_tried_on_what_is_left_and_tell_on_a_defence_that_effort_helps(run: Any) -> None:
    found = run.summary.of("planted:plain+bits:8")
    short = next(act for act in found.acts if act.name.startswith(SHORT))
    left = sum(
        image.held_in(act.name for act in found.acts if act.name.startswith((MODE, FEATURE))) for image in found.images
    )
    assert (short.tried, short.right, short.left_only) == (left, left, True)
    assert "more steps" not in {check.name for check in compared_checks(found)}
    better = [act.model_copy(update={"right": 1}) if act.name == short.name else act for act in found.acts]
    said = {check.name: check.message for check in compared_checks(found.model_copy(update={"acts": better}))}
    assert f"fools {left - 1} of the {left} images" in said["more steps"]
    assert act_words("short:identity").startswith("PGD of a quarter of the steps, what the defence adds")


def test_passes_of_the_attack_on_features_are_counted_where_a_defence_answers_for_itself(tmp_path: Path) -> None:
    found = rv.judge("tiny+tte:2", limit=2, eps="0.01/255", steps=2, queries=0, device="cpu", out=tmp_path)
    base, defended = found.summary.models
    acts = [{act.name: act for act in one.acts}["feature"] for one in (base, defended)]
    assert [act.tried for act in acts] == [2, 2]
    assert acts[0].backward == acts[1].backward >= 2 * 2, "the same attack, on the same encoder"
    assert acts[1].forward - acts[0].forward == 2, "its points are shown to two views instead of one"


@pytest.mark.parametrize("targets", [0, 1, 7])
def test_wrong_classes_are_aimed_at_as_many_as_asked_for(
    place: Path, targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def watched(*given: Any, **options: Any) -> Any:
        made.append(options["attack"])
        return perturb(*given, **options)

    monkeypatch.setattr("robustvlm.commands.judge.attacks.perturb", watched)
    run = judge(place, "planted:plain+bits:8", f"targets-{targets}", eps="1/255", targets=targets)
    acts = [act.name for act in run.summary.of("planted:plain").acts]
    assert [name for name in acts if name.startswith(TARGETED)] == [f"{TARGETED}own"] * bool(targets)
    aimed = [attack for attack in made if "apgd-t" in str(attack)]
    assert set(aimed) == ({f"apgd-t:steps=4:targets={targets}"} if targets else set())
    assert run.summary.targets == targets
    words = f"up to {targets} wrong class{'' if targets == 1 else 'es'}" if targets else "no APGD towards wrong classes"
    for name in ("report.md", "report.tex", "report.html"):
        assert words in (run.folder / name).read_text()


def test_more_points_than_can_be_looked_at_are_refused_before_any_work(place: Path) -> None:
    with pytest.raises(UserError, match="would look at up to 2,000,000 points of every image: take fewer steps"):
        judge(place, "planted:plain+bits:8", "too-many", steps=1000, targets=2000)
    assert not (place / "runs" / "too-many").exists()


def test_an_encoder_that_several_models_share_is_counted_once() -> None:
    encoder, defended = load_pipeline("tiny"), load_pipeline("tiny+bits:3")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), counted_passes(encoder, encoder) as outer, counted_passes(encoder) as inner:
        encoder.encode_image(pixels)
    assert (outer.forward, inner.forward) == (2, 2)
    assert "_image_features" not in vars(encoder), "all is as it was"
    with torch.no_grad(), counted_passes(encoder, defended) as seen:
        encoder.encode_image(pixels)
        defended.encode_image(pixels)
    assert seen.forward == 4


class _TwoSides(VLM):
    """An image side with the texts of another model, which stands behind it among its modules."""

    def __init__(self, text: VLM) -> None:
        super().__init__(spec="two", image_size=64, logit_scale=1.0)
        self.text = text

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return self.text.embed_text(texts)


def test_passes_are_those_of_the_image_side() -> None:
    model = _TwoSides(load_pipeline("tiny"))
    with torch.no_grad(), counted_passes(model) as seen:
        model.encode_image(torch.rand(3, 3, 64, 64))
    assert seen.forward == 3


def test_a_summary_of_the_version_before_is_read_by_the_present_rules(run: Any) -> None:
    found = run.summary.of("planted:plain+bits:8")
    acts = [act for act in found.acts if not act.name.startswith(SHORT)]
    old = found.model_copy(update={"acts": acts, "adaptive": found.clean})
    models = [one if one.spec != old.spec else old for one in run.summary.models]
    again = as_read(run.summary.model_copy(update={"models": models})).of(old.spec)
    assert again.adaptive == found.adaptive != found.clean
    assert "a fresh run may find more" in {check.name: check.message for check in again.checks}["more steps"]
    assert all(check.name != "attacks" for check in again.checks)
    older = as_read(run.summary.model_copy(update={"effort": 1})).of(old.spec)
    assert "a fresh run may differ" in {check.name: check.message for check in older.checks}["attacks"]


def test_a_run_of_weaker_attacks_is_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"limit": 4, "queries": 0, "steps": 4}
    with monkeypatch.context() as before:
        before.setattr("robustvlm.commands.judge.attacks.EFFORT", 1)
        judge(place, "planted:plain+bits:8", "of-before", **asked)
    with pytest.raises(rv.UserError, match=r"made with other settings \(effort: 1 -> \d\)"):
        judge(place, "planted:plain+bits:8", "of-before", **asked)


def test_words_and_tables() -> None:
    assert claim_words(Claim("B/32", "ten sets", "PGD-100", None, 91.3)).endswith(
        "radius not read, unaware of the defence"
    )
    table = table_of_defences()
    assert all(f"| `+{name}" in table for name in DEFENCES)
    assert list(UNAWARE) == ["unaware:pgd", "unaware:apgd"]
    assert json.loads(json.dumps([cell for cell in table.splitlines()[0].split("|") if cell.strip()]))


def test_the_table_of_the_docs_is_the_present_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    assert f"\n{table_of_defences()}\n" in page, "python tools/defence_table.py writes it"


def test_a_claim_is_compared_at_its_own_radius_and_steps_and_for_whole_methods(run: Any) -> None:
    some = run.summary.of("planted:plain+bits:8")

    def said(name: str, right: int, *, eps: float = 4 / 255, steps: int = 100, norm: str = "Linf") -> str:
        facts = some.facts.model_copy(update={"defences": [name]})
        unaware = {**some.unaware, next(iter(UNAWARE)): rate(right, 1000)}
        found = some.model_copy(update={"spec": f"ViT-B-32/openai+{name}", "facts": facts, "unaware": unaware})
        return reproduction(found, run.summary.model_copy(update={"eps": eps, "steps": steps, "norm": norm}))

    claim = next(one for one in DEFENCES["dbd"].about.claims if one.model == "CLIP ViT-B/32")
    near = round(10 * claim.robust)
    assert "comes within 5 points of the claimed unaware figure" in said("dbd", near)
    assert "does not reproduce the claimed unaware figure" in said("dbd", near - 80)
    assert said("dbd", near, eps=1 / 255) == said("dbd", near, norm="L2") == ""
    assert said("dbd", near, steps=1) == "What was claimed is under 100 steps of PGD, here 1: compare with --steps 100."
    assert "differ (6.8 % for eight sets" in said("ttc", 240)  # two groups published figures that contradict each other
    assert said("rtpt", 353) == ""  # of which this is a part


def test_a_claim_stands_as_a_bar_only_beside_figures_of_its_ball(run: Any) -> None:
    some = run.summary.of("planted:plain+bits:8")
    for name, eps, claimed in (("dbd", 4 / 255, True), ("dbd", 1 / 255, False), ("clipure", 4 / 255, False)):
        facts = some.facts.model_copy(update={"defences": [name]})
        found = some.model_copy(update={"spec": f"ViT-B-32/openai+{name}", "facts": facts})
        first, *_ = bars_of(found, run.summary.model_copy(update={"eps": eps, "norm": "Linf"}))
        assert first[0].startswith("claimed") == claimed, (name, eps)


def test_another_base_than_a_model_s_own_is_refused(place: Path) -> None:
    with pytest.raises(
        rv.UserError, match=r"stands on 'planted:plain', and base names 'planted:stairs' as the undefended"
    ):
        judge(place, "planted:plain+bits:3", "other", base="planted:stairs")


@pytest.mark.slow
def test_a_robust_encoder_behind_a_harmless_transform_keeps_what_it_is_worth(tmp_path: Path) -> None:
    same = {"limit": 48, "eps": "2/255", "device": "cpu", "out": tmp_path}
    found = rv.judge("tiny-robust+bits:8", steps=50, queries=100, **same)
    base, defended = found.summary.models
    found_by_autoattack = rv.attack("tiny-robust", attack="standard", **same).verdicts()
    held = {image.image_id for image in found_by_autoattack.images if found_by_autoattack.after(image, 0) == "robust"}
    assert 10 < len(held) < 40
    for judged in (base, defended):
        ours = {image.id for image in judged.images if image.held}
        assert (
            mcnemar_exact([name in ours for name in held | ours], [name in held for name in held | ours]).p_value > 0.2
        )
        assert len(ours ^ held) <= 3
    assert defended.gain_p > 0.2
    assert defended.adaptive.low <= len(held) / 48 <= defended.adaptive.high

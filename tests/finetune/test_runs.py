"""Fine-tuning runs: what is left in the folder is the model that was trained, whatever happened on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from small import COLOURS, OWN, clip_folder, pictures, prepared
from torch import Tensor

import robustvlm as rv
from robustvlm.commands.export import export
from robustvlm.commands.finetune.work import parse_options
from robustvlm.data import open_data
from robustvlm.data.trees import load_forest
from robustvlm.defenses import load_classifier, load_pipeline
from robustvlm.defenses.finetune import METHODS
from robustvlm.defenses.finetune.trainable import plain_state
from robustvlm.errors import UserError
from robustvlm.models import VLM
from robustvlm.models.saved import read_card
from robustvlm.report.training import load_training_run
from robustvlm.runs.settings import Observer
from robustvlm.training.state import LAST, read_checkpoint

PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def assert_same(found: VLM, trained: VLM) -> None:
    """The weights agree to the bit; features may differ, as torch takes other paths where gradients are wanted."""
    wanted = plain_state(trained)
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    torch.testing.assert_close(found.encode_image(PIXELS), trained.encode_image(PIXELS).detach())


def test_an_open_clip_run_is_a_model_of_its_own(tmp_path: Path) -> None:
    base = clip_folder(tmp_path / "base")
    run = prepared(tmp_path, model=str(base))
    summary = run.start().summary
    assert summary.history.steps[-1].terms["loss"] < summary.history.steps[0].terms["loss"]
    found = load_pipeline(str(run.folder.path))
    assert_same(found, run.work.vlm)
    assert not torch.allclose(found.encode_image(PIXELS), load_pipeline(str(base)).encode_image(PIXELS), atol=1e-3)
    assert torch.equal(found.encode_text(["red"]), load_pipeline(str(base)).encode_text(["red"]))
    card = read_card(run.folder.path)
    assert card is not None
    assert (card.kind, card.settings["method"]) == ("finetune", "tecoa")
    names = open_data(run.settings.data).class_names
    assert load_classifier(str(run.folder.path), names, ["{}"]).class_names == names


def test_an_exported_run_is_read_by_open_clip_itself(tmp_path: Path) -> None:
    run = prepared(tmp_path, model=str(clip_folder(tmp_path / "base")), steps=3, trainable="lora:2")
    run.start()
    export(str(run.folder.path), tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    tokens = open_clip.get_tokenizer(
        f"local-dir:{tmp_path / 'out'}", bpe_path=str(tmp_path / "out" / "bpe_merges.txt.gz")
    )
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.3, 0.3, 0.2]))
    vlm = load_pipeline(str(run.folder.path))
    with torch.no_grad():
        images = model.encode_image((PIXELS - mean) / std, normalize=True)
        texts = model.encode_text(tokens(["a red thing", "blue"]), normalize=True)
    torch.testing.assert_close(images, vlm.encode_image(PIXELS))
    torch.testing.assert_close(texts, vlm.encode_text(["a red thing", "blue"]))
    export(str(run.folder.path), tmp_path / "out")  # the same again: it is there already
    for other, half in ((tmp_path / "base", False), (run.folder.path, True)):
        with pytest.raises(UserError, match="not an empty folder: choose another one"):
            export(str(other), tmp_path / "out", half=half)
    export(str(run.folder.path), tmp_path / "halved", half=True)
    export(str(run.folder.path), tmp_path / "halved", half=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder: choose another one"):
        export(str(run.folder.path), tmp_path / "out")


def test_an_encoder_of_one_s_own_gets_new_weights_laid_over_it(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    run.start()
    assert read_card(run.folder.path).base == OWN  # type: ignore[union-attr]
    found = load_pipeline(str(run.folder.path))
    assert_same(found, run.work.vlm)
    with pytest.raises(UserError, match=r"more than a model of open_clip or transformers \(a CustomVLM\)"):
        export(str(run.folder.path), tmp_path / "out")


def test_a_tuned_model_is_the_same_by_whatever_path_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, model in (("own", OWN), ("clip", str(clip_folder(tmp_path / "base")))):
        folder = prepared(tmp_path, model=model, name=name, steps=1).start().folder
        monkeypatch.chdir(tmp_path)
        found = [load_pipeline(str(path)) for path in (folder, Path(name), tmp_path / "base" / ".." / name)]
        assert len({vlm.fingerprint for vlm in found}) == 1
        assert len({vlm.text_fingerprint for vlm in found}) == 1
        built = rv.build(name, smooth="0.25:4", out="built", name=name, device="cpu").folder.resolve()
        monkeypatch.chdir(tmp_path.parent)
        assert load_pipeline(str(built)).image_size == found[0].image_size, "it knows its base from anywhere"


class Interrupted(Observer):
    """Presses Ctrl-C when a step is reached."""

    done = 0

    def advance(self, count: int = 1, **shown: str) -> None:
        del shown
        self.done += count
        if self.done == 8:
            raise KeyboardInterrupt


@pytest.mark.equality
def test_an_interrupted_run_goes_on_and_ends_as_a_straight_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, name="stopped").start(Interrupted())
    with pytest.raises(UserError, match="has not ended: give its finetune command again"):
        load_training_run(tmp_path / "stopped")
    with pytest.raises(UserError, match="of `robustvlm finetune` has not ended"):
        load_pipeline(str(tmp_path / "stopped"))
    stopped, straight = (prepared(tmp_path, name=name).start().summary for name in ("stopped", "straight"))
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("stopped", "straight")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert stopped.history.validations == straight.history.validations
    assert prepared(tmp_path, name="straight").start().summary == straight


def test_other_settings_need_another_name(tmp_path: Path) -> None:
    prepared(tmp_path, steps=3).start()
    with pytest.raises(UserError, match=r"made with other settings \(lr: 0.01 -> 0.02\)"):
        prepared(tmp_path, steps=3, lr=0.02).start()
    prepared(tmp_path, steps=3, lr=0.02).start(fresh=True)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]["lr"] == 0.02


def test_a_run_under_the_loss_that_a_method_once_had_is_not_gone_on_with(tmp_path: Path) -> None:
    run = prepared(tmp_path, steps=3, method="simclip")
    assert run.manifest["model"]["loss"] == "cosine to the frozen original's features"
    run.start()
    path = tmp_path / "run" / "manifest.json"
    old = json.loads(path.read_text())
    del old["model"]["loss"]
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"model loss: None -> cosine to the frozen original"):
        prepared(tmp_path, steps=3, method="simclip").start()
    assert "loss" not in prepared(tmp_path, steps=3, method="tecoa").manifest["model"]


@pytest.mark.parametrize(("method", "trainable"), [*((name, "all") for name in sorted(METHODS)), ("pmg", "ssf")])
def test_every_method_trains_and_is_written(tmp_path: Path, method: str, trainable: str) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"name": "all", "children": [{"name": "warm", "children": ["red"]}, "green", "blue"]}))
    model = str(clip_folder(tmp_path / "base")) if trainable == "ssf" else OWN
    run = prepared(tmp_path, model=model, method=method, trainable=trainable, steps=2, tree=[str(tree)])
    summary = run.start().summary
    assert summary.method == method
    assert load_forest(run.folder.path / "trees.json", run.work.source.class_names)[0].ancestor("red", 1) == "warm"
    # Forward and backward of the step, as much for each inner step, and a pass of the teacher's or the like.
    passes = summary.history.passes / summary.history.images
    assert passes == {"clean": 2, "tecoa": 6, "hierarchical": 6}.get(method, passes)
    assert_same(load_pipeline(str(run.folder.path)), run.work.vlm)


@pytest.mark.parametrize("option", ["gradient_checkpointing", pytest.param("compile", marks=pytest.mark.slow)])
def test_what_saves_memory_or_time_changes_nothing(tmp_path: Path, option: str) -> None:
    base = str(clip_folder(tmp_path / "base"))
    plain, other = (
        prepared(tmp_path, model=base, name=name, steps=3, **{option: name == "b"}).start().summary for name in "ab"
    )
    for a, b in zip(plain.history.steps, other.history.steps, strict=True):
        assert a.terms == pytest.approx(b.terms, rel=1e-4)
    assert plain.history.passes == other.history.passes
    assert not other.history.warnings


def test_the_radius_where_none_is_given_is_one_of_the_norm(tmp_path: Path) -> None:
    for norm, eps in (("Linf", 1 / 255), ("l2", 0.5)):
        run = prepared(tmp_path, eps=None, norm=norm)
        assert (run.work.tuning.attack.threat.eps, run.manifest["config"]["eps"]) == (eps, eps)
    assert prepared(tmp_path, eps="0.1", norm="L2").work.tuning.attack.threat.eps == 0.1


def unlabelled(folder: Path, column: str | None) -> tuple[str, Path]:
    """Write the pictures as Parquet, all labels -1 or none at all, and a file of class names; return both."""
    paths = sorted(path for name in COLOURS for path in (folder / name).iterdir())
    table = {"image": [path.read_bytes() for path in paths]}
    (folder / "names.txt").write_text("\n".join(COLOURS))
    pq.write_table(pa.table(table | ({column: [-1] * len(paths)} if column else {})), folder / "all.parquet")
    return f"parquet:{folder / 'all.parquet'}{'' if column else '?label='}", folder / "names.txt"


@pytest.mark.parametrize(("column", "method"), [("label", "fare"), (None, "agft")])
def test_without_labels_the_last_weights_are_kept_and_it_is_said(
    tmp_path: Path, column: str | None, method: str
) -> None:
    pictures(tmp_path / "pictures")
    data, names = unlabelled(tmp_path / "pictures", column)
    run = prepared(tmp_path, data=data, classes=names, method=method, steps=4, validate_every=1)
    summary = run.start().summary
    assert (summary.best_by, summary.history.best_step) == (None, None)
    assert [warning.name for warning in summary.history.warnings][-1] == "no labels"
    assert [set(found.measures) for found in summary.history.validations] == [{"feature spread"}] * 5
    assert "the weights of the last one were kept" in run.folder.report_path.read_text()
    last = read_checkpoint(run.folder.path / LAST)[0]["weights"]
    assert all(torch.equal(plain_state(run.work.vlm)[name], value) for name, value in last.items())
    with pytest.raises(UserError, match="holds no readable image of a known class to validate on"):
        prepared(tmp_path, data=data, classes=names, name="labels", steps=1).start()
    if column is None:
        with pytest.raises(UserError, match=r"no label column: .*, or write \?label= for images without labels"):
            prepared(tmp_path, data=data.removesuffix("?label="), classes=names)


def test_with_labels_to_validate_on_these_choose_for_every_method(tmp_path: Path) -> None:
    summary = prepared(tmp_path, method="fare", steps=2).start().summary
    assert (summary.best_by, summary.history.best_step) == ("robust accuracy", 2)


def test_validation_images_are_held_out_or_given(tmp_path: Path) -> None:
    run = prepared(tmp_path, val_limit=5)
    images, held = run.work.images()
    assert not set(images.ids) & set(held.ids)
    assert (len(images), len(held.ids)) == (33, 3)  # a tenth of 36
    other = pictures(tmp_path / "others", each=2)
    images, held = prepared(tmp_path, val=other, val_limit=5).work.images()
    assert (len(images), len(held.ids)) == (36, 5)


def test_the_report_shows_the_record_and_escapes_names(tmp_path: Path) -> None:
    run = prepared(tmp_path, steps=4, command="robustvlm finetune '<script>x</script>'")
    summary = run.start().summary
    page = run.folder.report_path.read_text()
    assert page.count("<svg") == 2
    assert "<script>x" not in page
    assert "&lt;script&gt;x" in page
    kept = summary.history.best()
    assert kept is not None
    assert f"which chose the weights (those of step {kept.step} of" in page
    assert re.search(rf"Encoder passes</dt><dd>{summary.history.passes:,} ", page)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "hierarchical"}, "has no class tree, which 'hierarchical' needs: pass tree=FILE"),
        ({"method": "tecao"}, "unknown method 'tecao': did you mean 'tecoa'"),
        ({"trainable": "last:0"}, "must be at least 1"),
        ({"trainable": "last:9"}, "got last:9|no blocks"),
        ({"augment": "much"}, "unknown augmentation 'much'"),
        ({"batch_size": 9, "accumulate": 2}, "cannot be cut into"),
        ({"limit": 0}, "limit must be at least 1 image"),
        ({"limit": 4}, "too small .4 images. to hold a part out: pass val=DATA"),
        (
            {"data": "emoji?split=train", "val_limit": 1},
            "groups of 4 or more, .* pass val_limit=4 or more, or val=DATA",
        ),
        ({"method": "clean", "inner_steps": 5}, "inner_steps is of the inner attack, and 'clean' makes none: leave it"),
        ({"method": "clean", "alpha": "1/255"}, "alpha is of the inner attack, and 'clean' makes none"),
        ({"val_limit": -5}, "val_limit must be at least 1 image, got -5"),
        ({"val_steps": 0}, "val_steps must be at least 1 PGD step, got 0"),
        ({"warmup": float("nan")}, "warmup must not be negative, and must be finite"),
        ({"method": "hierarchical", "option": ["eps_text=1e40"]}, "eps_text is a radius on tangent vectors, at most"),
        ({"inner_steps": 0}, "at least 1 step"),
        ({"tree": ["nowhere.json"]}, "no tree file at nowhere.json"),
        ({"tree": ["llm"]}, "needs llm=URL and llm_model=NAME"),
        ({"tree": ["llm"], "llm": "http://localhost:1/v1"}, "say which model to ask"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, **settings).start()


def test_a_subset_that_the_model_lacks_is_found_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 blocks, got last:9"):
        prepared(tmp_path, model=str(clip_folder(tmp_path / "base")), trainable="last:9")
    assert not (tmp_path / "run").exists()


def test_the_training_data_are_no_validation_data(tmp_path: Path) -> None:
    data = pictures(tmp_path / "pictures")
    with pytest.raises(UserError, match="--val names the training data"):
        prepared(tmp_path, val=data)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures" / "red" / "late.png").write_bytes((tmp_path / "pictures" / "red" / "0.png").read_bytes())
    with pytest.raises(UserError, match="--val names the training data"):
        prepared(tmp_path, val=f"imagefolder:{link}/")


def test_drawings_that_are_trained_on_are_no_validation_data(tmp_path: Path) -> None:
    train = "emoji?split=train&styles=noto&copies=1"
    copies = r"278 images of --val .* are also trained on, or are copies of images that are \(the first, 'emoji/noto/"
    with pytest.raises(UserError, match=copies):
        prepared(tmp_path, data=train, val="emoji?split=train&styles=noto&copies=2", val_limit=500)
    with pytest.raises(UserError, match=r"images of --val .* are also trained on \(the first, 'emoji/noto/"):
        prepared(tmp_path, data="emoji?split=train&copies=1", val=train, val_limit=100)
    prepared(tmp_path, data=train, val="emoji?split=val&copies=1")


def test_validation_images_that_taught_the_model_before_are_told(tmp_path: Path) -> None:
    first, val = prepared(tmp_path, name="first", steps=1).start().folder, pictures(tmp_path / "val", each=5)
    again = prepared(tmp_path, name="again", model=str(first), data=val, val=f"imagefolder:{tmp_path / 'pictures'}")
    assert f"the images of --val taught '{first}' before: figures on them are too high" in again.manifest["remarks"]


@pytest.mark.equality
@pytest.mark.slow
def test_two_ranks_tune_what_one_would(tmp_path: Path) -> None:
    """The hierarchical method averages over the images of all ranks and trains the text projection."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    few = ["--steps", "4", "--batch-size", "8", "--lr", "1e-4", "--val-limit", "12", "--validate-every", "0"]
    options = [
        "--method",
        "hierarchical",
        "--data",
        "emoji?split=train&copies=1",
        "--limit",
        "200",
        "--inner-steps",
        "1",
    ]
    for ranks in (1, 2):
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks > 1 else []
        where = ["--out", str(tmp_path), "--name", f"ranks-{ranks}", "--device", "cpu"]
        command = [sys.executable, *several, "-m", "robustvlm", "finetune", "tiny", *options, *few, *where]
        subprocess.run(command, env=environment, check=True, timeout=300, cwd=tmp_path)
    found = [read_checkpoint(tmp_path / f"ranks-{ranks}" / LAST) for ranks in (1, 2)]
    one, two = (parts["weights"] for parts, _ in found)
    assert any("text_projection" in name for name in one)
    start = load_pipeline("tiny").state_dict()

    def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        return float(torch.stack([(a[name] - b[name]).double().square().sum() for name in one]).sum().sqrt())

    # Single weights of hardly any gradient go by its sign, so the distance of all together is what counts.
    assert apart(one, two) < 0.01 * apart(one, start)
    losses = [[entry["terms"]["loss"] for entry in facts["history"]["steps"]] for _, facts in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("tecoa", "curvature=1", "has no option 'curvature': it has none"),
        ("hierarchical", "curvatur=1", "did you mean 'curvature'"),
        ("hierarchical", "negatives=2", "write negatives=true or negatives=false"),
        ("hierarchical", "depth=deep", "'depth' is a number"),
        ("hierarchical", "depth", "written NAME=VALUE"),
        ("tree", "depth=1", "unknown method 'tree'"),
    ],
)
def test_options_of_a_method_are_checked(method: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_options(method, [text])


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000])
def test_options_of_absurd_length_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is on or off"):
        parse_options("pmg", [f"reverse={text}"])

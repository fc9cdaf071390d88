"""Runs for every goal: what is attacked, what counts, and what the summary says of it, checked against the model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from attacking import Attacking, Interrupt, prepared, rows, run_in_pieces, table
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from robustvlm.commands.attack.summary import Summary
from robustvlm.errors import UserError
from robustvlm.stats import mean

Photos = Callable[..., Path]
TREE = "parent,child\nthing,pet\nthing,wild\npet,cat\npet,dog\nwild,fox\n"
OWN = """
import torch
from small_encoders import Encoder
from robustvlm.models import zero_shot
from robustvlm.models.custom import CustomVLM

class Quantise(torch.nn.Module):
    differentiable = False

    def forward(self, pixels):
        return (pixels * 255).round() / 255

class Logits(torch.nn.Module):
    image_size = 16

    def __init__(self):
        super().__init__()
        vlm = CustomVLM(Encoder(), spec="x")
        self.head = zero_shot(vlm, ["cat", "dog", "fox"], ["a photo of a {}."], cache=False)
        self.quantise = Quantise()

    def forward(self, pixels):
        return self.head(self.quantise(pixels))
"""


@pytest.fixture(autouse=True)
def _quick_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_: str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree.csv"
    path.write_text(TREE)
    return path


@pytest.fixture
def mixed(tmp_path: Path, labelled_pictures: list[tuple[Image.Image, str]]) -> str:
    """A Parquet file of labelled pictures, and of as many without a label: noise of another kind."""
    found = []
    for number, (image, label) in enumerate(labelled_pictures[:16]):
        found.append((image, label))
        noise = np.random.default_rng(900 + number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        found.append((Image.fromarray(noise), None))
    data = []
    for image, _ in found:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data.append(buffer.getvalue())
    pq.write_table(pa.table({"image": data, "label": [label for _, label in found]}), tmp_path / "mixed.parquet")
    return f"parquet:{tmp_path / 'mixed.parquet'}"


def attack(photos: Path, model: str = "Encoder", **settings: Any) -> tuple[Attacking, Summary]:
    settings = {"attack": "pgd:steps=8", "eps": "4/255", "save_adversarial": True, **settings}
    run = prepared(photos, model, **settings)
    return run, run.run()


def saved(run: Attacking) -> dict[int, Tensor]:
    """Return the adversarial images by number."""
    folder = run.folder.adversarial_path
    return {int(path.stem): load_file(path)["adversarial"] for path in folder.glob("*.safetensors")}


def asked(run: Attacking, images: dict[int, Tensor]) -> dict[int, Tensor]:
    with torch.no_grad():
        return {index: run.work.aim.model(pixels[None])[0] for index, pixels in images.items()}


def test_a_targeted_attack_leaves_out_the_target_and_ends_at_it(make_folder: Photos) -> None:
    run, summary = attack(make_folder(24), goal="targeted:fox", eps="8/255")
    assert summary.images.left_out + summary.images.evaluated == 24
    assert all(row["label"] != 2 and row["goal"] == "targeted:fox" for row in rows(run))
    assert summary.per_eps[0].fooled > 0
    outputs = asked(run, saved(run))
    assert len(outputs) == summary.per_eps[0].fooled
    assert all(logits.argmax() == 2 for logits in outputs.values())
    for row in rows(run):
        assert (row["outcome"] == "clean_wrong") == (row["clean_prediction"] == 2)


def test_a_superclass_attack_leaves_the_superclass(make_folder: Photos, tree: Path) -> None:
    run, summary = attack(make_folder(24), goal="superclass:1", tree=tree, eps="8/255")
    group = [0, 0, 1]
    for row in rows(run):
        wrong = group[row["clean_prediction"]] != group[row["label"]]
        assert (row["outcome"] == "clean_wrong") == wrong
        if row["outcome"] == "fooled":
            assert group[row["adversarial_prediction"]] != group[row["label"]]
    at = summary.per_eps[0]
    by_level = {level.level: level for level in at.levels}
    assert by_level[1].robust_accuracy == at.robust_accuracy
    assert by_level[0].clean_accuracy == summary.clean_accuracy


def matrix(make_folder: Photos, tree: Path, name: str, **settings: Any) -> Attacking:
    more = {"attack": "pgd:steps=4,apgd-ce:steps=4", "eps": "2/255,6/255", "lanes": 8, **settings}
    return prepared(make_folder(20, name), goal="superclass:matrix", tree=tree, name=name, **more)


def test_the_level_matrix_attacks_every_image_at_every_level(make_folder: Photos, tree: Path) -> None:
    run = matrix(make_folder, tree, "m")
    summary = run.run()
    found = rows(run)
    assert {row["goal"] for row in found} == {"superclass:0", "superclass:1", "superclass:all"}
    assert all(row["steps"] > 0 for row in found)
    assert len(found) == 20 * 3 * 2 * 2
    at = summary.per_eps[1]
    assert at.transfer is not None
    assert len(at.transfer.levels) == 2
    for attacked, row in zip(("superclass:0", "superclass:1", "superclass:all"), at.transfer.rows, strict=True):
        for level, group in enumerate(([0, 1, 2], [0, 0, 1])):
            right = 0
            for index in range(20):
                mine = [r for r in found if r["index"] == index and r["goal"] == attacked]
                said = [mine[0]["clean_prediction"], *(r["adversarial_prediction"] for r in mine)]
                right += all(group[prediction] == group[mine[0]["label"]] for prediction in said)
            assert row.robust_accuracy[level].successes == right
    own = {row.goal: row.robust_accuracy for row in at.transfer.rows}
    assert own["superclass:0"][0].successes <= own["superclass:1"][0].successes
    # The verdict is that of attacks against the classes themselves.
    leaf = [r for r in found if r["goal"] == "superclass:0"]
    wrong = {r["index"] for r in leaf if r["clean_prediction"] != r["label"]}
    fell = {r["index"] for r in leaf if r["adversarial_prediction"] != r["label"]}
    assert at.robust_accuracy.successes == 20 - len(wrong | fell)
    assert summary.images.exposed == 20 - len(wrong)


@pytest.mark.equality
def test_an_interrupted_matrix_ends_as_an_uninterrupted_one(make_folder: Photos, tree: Path) -> None:
    whole = matrix(make_folder, tree, "whole")
    whole.run()
    make_folder(20, "pieces")
    photos = whole.folder.path.parent.parent / "pieces"
    again = run_in_pieces(lambda: matrix(lambda *_: photos, tree, "pieces"), [25, 40])
    assert table(again).equals(table(whole))


def test_feature_attacks_push_the_cosine_down_and_report_it(make_folder: Photos) -> None:
    run, summary = attack(make_folder(12), goal="feature", min_cos=0.8, attack="pgd:steps=10,apgd-ce:steps=10")
    found, at = rows(run), summary.per_eps[0]
    assert all(row["steps"] > 0 for row in found), "no image leaves before the budget is spent"
    assert all(row["clean_cosine"] == pytest.approx(1) for row in found)
    assert all((row["cosine"] < 0.8) == (row["outcome"] == "fooled") for row in found)
    assert all(row["margin"] == pytest.approx(row["cosine"] - 0.8, abs=1e-6) for row in found)
    lowest = [min(row["cosine"] for row in found if row["index"] == index) for index in range(12)]
    assert at.cosine is not None
    assert at.cosine.attacked == mean(lowest)
    assert at.attack_success_rate.successes == sum(cosine < 0.8 for cosine in lowest)
    assert at.cosine.attacked.value is not None
    assert at.cosine.attacked.value < 0.95
    outputs = asked(run, saved(run))
    assert outputs
    for index, feature in outputs.items():
        clean = run.work.aim.model(load_file(run.folder.adversarial_path / f"{index:06d}.safetensors")["clean"][None])[
            0
        ]
        assert (feature @ clean).item() < 0.8 + 1e-5
    assert "push the cosine to the clean feature below 0.8" in run.folder.report_path.read_text(encoding="utf-8")


def test_feature_attacks_reach_for_a_target(make_folder: Photos, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (250, 5, 10)).save(tmp_path / "aim.png")
    photos = make_folder(8)
    for name, goal in (("image", f"feature:{tmp_path / 'aim.png'}"), ("text", "feature:a photo of a tractor.")):
        run, summary = attack(photos, goal=goal, name=name, eps="8/255")
        at = summary.per_eps[0]
        assert at.cosine is not None
        assert at.cosine.clean.value is not None
        assert at.cosine.attacked.value is not None
        assert at.cosine.attacked.value > at.cosine.clean.value + 0.05
        assert all((row["margin"] < 0) == (row["outcome"] == "fooled") for row in rows(run) if row["steps"])


def test_a_run_aims_at_one_picture(make_folder: Photos, tmp_path: Path) -> None:
    """A stopped run must not go on towards another picture of the same name, nor a finished one stand for it."""
    aim, photos = tmp_path / "aim.png", make_folder(4)
    Image.new("RGB", (16, 16), (250, 5, 10)).save(aim)
    attack(photos, goal=f"feature:{aim}", name="image")
    attack(photos, goal=f"feature:{aim}", name="image")
    Image.new("RGB", (16, 16), (5, 250, 10)).save(aim)
    with pytest.raises(UserError, match="picture of"):
        attack(photos, goal=f"feature:{aim}", name="image")


def test_known_images_are_denied(mixed: str, tmp_path: Path) -> None:
    run, summary = attack(tmp_path / "x", "Encoder+reject:0.5", data=mixed, goal="deny")
    at = summary.per_eps[0]
    assert (summary.images.evaluated, summary.images.left_out) == (16, 16)
    assert all((row["outcome"] == "clean_wrong") == (row["clean_prediction"] == -1) for row in rows(run))
    assert at.acceptance is not None
    assert at.acceptance.clean_rejected == 16 - (summary.images.exposed or 0)
    assert at.acceptance.rejected == at.acceptance.clean_rejected + at.fooled
    assert at.fooled > 0
    assert all(output[-1] <= 0 for output in asked(run, saved(run)).values())


def test_unknown_images_intrude(mixed: str, tmp_path: Path) -> None:
    run, summary = attack(tmp_path / "x", "Encoder+reject:0.9", data=mixed, goal="intrude", eps="8/255")
    at = summary.per_eps[0]
    assert (summary.images.evaluated, summary.images.left_out) == (16, 16)
    assert all(row["label"] == -1 for row in rows(run))
    assert summary.clean_accuracy.successes == summary.images.exposed
    assert at.fooled > 0
    assert at.per_class == at.levels == []
    assert all(output[-1] > 0 for output in asked(run, saved(run)).values())
    text = run.folder.report_path.read_text(encoding="utf-8")
    assert "make the model accept" in text
    assert "an unknown class" in text


def test_mistakes_of_a_refusing_model_count_only_if_accepted(mixed: str, tmp_path: Path) -> None:
    run, summary = attack(tmp_path / "x", "Encoder+reject:0.5", data=mixed, eps="8/255")
    for row in rows(run):
        mistaken = row["clean_prediction"] not in (-1, row["label"])
        assert (row["outcome"] == "clean_wrong") == mistaken
    assert summary.per_eps[0].fooled > 0
    labels = {row["index"]: row["label"] for row in rows(run)}
    for index, output in asked(run, saved(run)).items():
        assert output[-1] > 0
        assert output[:-1].argmax() != labels[index]


def test_images_without_a_label_do_not_disturb_the_others(mixed: str, tmp_path: Path) -> None:
    run, summary = attack(tmp_path / "x", data=mixed, save_adversarial=False)
    assert (summary.images.evaluated, summary.images.left_out) == (16, 16)
    again = prepared(tmp_path / "x", data=mixed, attack="pgd:steps=8", eps="4/255", name="pieces")
    with pytest.raises(KeyboardInterrupt):
        again.run(Interrupt(20))
    resumed = prepared(tmp_path / "x", data=mixed, attack="pgd:steps=8", eps="4/255", name="pieces")
    assert resumed.run().images == summary.images
    assert table(resumed).equals(table(run))


def test_data_without_an_image_for_the_goal_are_refused(make_folder: Photos) -> None:
    with pytest.raises(UserError, match="6 of its images are of known classes: the goal intrude needs images"):
        attack(make_folder(6), "Encoder+reject:0.5", goal="intrude")


def test_a_classifier_of_the_user_is_attacked_through_its_stand_ins(
    make_folder: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_logits.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    photos = make_folder(16)
    out = tmp_path / "runs"
    run = Attacking(
        model="own_logits:Logits", data=f"imagefolder:{photos}", attack="pgd:steps=8", eps="4/255", lanes=8,
        checks="none", device="cpu", out=out, name="own",
    )  # fmt: skip
    summary = run.run()
    assert summary.per_eps[0].fooled > 0
    (note,) = [check for check in summary.checks if check.name == "gradient stand-ins"]
    assert note.message.startswith("Part 'model.quantise' (Quantise) has no gradient")
    with pytest.raises(UserError, match="need an image encoder"):
        Attacking(model="own_logits:Logits", data=f"imagefolder:{photos}", goal="feature", device="cpu", out=out)


@pytest.mark.parametrize(
    ("goal", "more"), [("feature", {"min_cos": 0.88}), ("superclass:matrix", {})], ids=["feature", "matrix"]
)
def test_whether_an_image_is_attacked_is_asked_once_of_a_random_model(
    goal: str, more: dict[str, float], make_folder: Photos, tree: Path
) -> None:
    """Asked anew by every stage, it would be reached unperturbed in one and attacked in the next."""
    settings = {"attack": "fgsm,pgd:steps=1", "eps": "0.1/255,0.2/255", "eot": 1, "draws": 3, **more}
    run = prepared(make_folder(12), "Random", goal=goal, tree=str(tree), **settings)
    summary = run.run()
    before: dict[tuple[Any, ...], set[bool]] = {}
    for row in rows(run):
        before.setdefault((row["goal"], row["image_id"]), set()).add(row["outcome"] == "clean_wrong")
    assert {len(said) for said in before.values()} == {1}
    assert {said for some in before.values() for said in some} == {True, False}
    assert {at.undecided for at in summary.per_eps} == {0}

"""What detect runs refuse, and what they leave out and name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detecting import DetectRun
from PIL import Image

from robustvlm.commands.detect import DetectSettings
from robustvlm.commands.detect.measures import Scored, own_decision, summarise_scores, thresholds_of
from robustvlm.commands.detect.remarks import of_familiar_strangers
from robustvlm.commands.detect.scoring import unknown_sets
from robustvlm.commands.detect.summary import OWN, OwnDecision
from robustvlm.errors import UserError


def test_images_that_were_learnt_from(detect_run: DetectRun, detect_images: Path) -> None:
    with pytest.raises(UserError, match="18 images are both in fit and in id"):
        detect_run(fit=f"imagefolder:{detect_images}/known").start()
    link, copy = detect_images / "link", detect_images / "copy"
    if not link.exists():
        link.symlink_to(detect_images / "known")
        shutil.copytree(detect_images / "known", copy)
    with pytest.raises(UserError, match="18 images are both in fit and in id"):
        detect_run(name="link", fit=f"imagefolder:{link}/").start()
    # In another folder equal ids say nothing; the images are noticed all the same.
    summary = detect_run(name="copies", fit=f"imagefolder:{copy}").start().summary
    assert any(check.level == "warning" and "18 of 18" in check.message for check in summary.checks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ood": []}, "unknown images are needed beside id: pass ood=DATA"),
        ({"id": None}, "pass id=DATA"),
        ({"ood": ["imagefolder:a", "imagefolder:a"]}, "are called 'a'"),
        ({"ood": ["known=imagefolder:a"]}, "cannot be called 'known'"),
        ({"scores": "msp,kn"}, "unknown score 'kn'"),
        ({"limit": 1}, "^limit must be at least 2 images, got 1"),
        ({"draws": 10}, "^draws must be at least 100 bootstrap samples, got 10"),
        ({"attack_scores": "msp"}, "attack_scores is for under_attack: pass both"),
        ({"under_attack": True, "attack_scores": "own"}, "never refuses"),
        ({"under_attack": True, "attack_scores": "mcm", "scores": "msp"}, "not in scores"),
        ({"under_attack": True, "attack": "torchattacks:PGD"}, "our own attacks only"),
        ({"under_attack": True, "eps": "1/255,2/255"}, "one radius"),
        ({"ood": ["x=nonsense:a"]}, "unknown data kind"),
        ({"fit": "emoji?split=train"}, "other classes"),
        ({"words": Path("absent.txt")}, "no words file"),
    ],
)
def test_mistakes_are_one_line(detect_run: DetectRun, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        detect_run(**changes).start()
    assert "\n" not in str(caught.value)


def test_a_set_is_not_called_by_a_secret() -> None:
    spec = "wds:https://me:s3cret@host/far.tar?sig=s3cret"
    (named,) = unknown_sets(DetectSettings(id="emoji", ood=spec))  # type: ignore[arg-type]
    assert named.name == "far"


def test_other_settings_are_another_run(detect_run: DetectRun) -> None:
    detect_run(scores="msp").start()
    with pytest.raises(UserError, match="made with other settings"):
        detect_run(scores="energy").start()
    assert [score.name for score in detect_run(scores="energy").start(fresh=True).summary.scores] == ["energy"]


def test_damaged_features_are_named(detect_run: DetectRun) -> None:
    run = detect_run(scores="msp")
    run.start()
    run.folder.summary_path.unlink()
    next(run.folder.features_path.glob("known-*.safetensors")).write_bytes(b"half a file")
    with pytest.raises(UserError, match="delete it, the run makes it again"):
        detect_run(scores="msp").start()


def test_unreadable_images_are_left_out_and_named(detect_run: DetectRun, tmp_path: Path) -> None:
    folder = tmp_path / "broken" / "thing"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    summary = detect_run(scores="msp", ood=[f"imagefolder:{tmp_path}/broken"]).start().summary
    assert summary.unknown[0].images == 3
    assert [image.id for image in summary.unreadable] == ["thing/3.png"]
    (folder / "0.png").unlink()
    for path in folder.glob("[12].png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 3 images"):
        detect_run(name="none", scores="msp", ood=[f"imagefolder:{tmp_path}/broken"]).start()


def test_a_model_that_gives_nan_is_named(
    detect_run: DetectRun, detect_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (detect_images / "gives_nan.py").write_text(
        "import torch\n"
        "from small_encoders import Encoder\n"
        "class Net(Encoder):\n"
        "    def encode_image(self, pixels):\n"
        "        found = super().encode_image(pixels)\n"
        "        return torch.full_like(found, torch.nan) if len(pixels) > 2 else found\n"
    )
    monkeypatch.syspath_prepend(str(detect_images))
    with pytest.raises(UserError, match=r"NaN or infinite values, first for the image 'cat/00\.png'"):
        detect_run("gives_nan:Net", scores="msp").start()


def scored(name: str, draws: np.random.Generator, logits: float, neighbours: float, count: int = 80) -> Scored:
    """Images whose logits and nearest neighbours lie so far from those of known images."""
    scores = {"energy": draws.normal(logits, 1, count), "knn": draws.normal(neighbours, 1, count)}
    ids = [f"{name}/{number}" for number in range(count)]
    return Scored(name, ids, ids, [-1] * count, [0] * count, scores)


def test_familiar_strangers_are_named_where_neighbours_know_better() -> None:
    draws = np.random.default_rng(4)
    sets = [scored("known", draws, 0, 0), scored("seen", draws, -0.2, -2), scored("new", draws, -2, -2)]
    thresholds = thresholds_of(sets[0])
    found = summarise_scores(sets[0], sets[1:], thresholds=thresholds, microseconds={}, draws=300, seed=0)
    warned = list(of_familiar_strangers(found, sets, thresholds))
    assert [check.name for check in warned] == ["familiar strangers, in seen"]
    only = np.mean((sets[1].scores["energy"] > thresholds["energy"]) & (sets[1].scores["knn"] <= thresholds["knn"]))
    assert f"Energy, which accepts {only:.0%} of the set" in warned[0].message
    # Nothing where they know as much or less, and nothing without them.
    turned = [replace(part, scores={"energy": part.scores["knn"], "knn": part.scores["energy"]}) for part in sets]
    found = summarise_scores(turned[0], turned[1:], thresholds=thresholds, microseconds={}, draws=300, seed=0)
    assert not list(of_familiar_strangers(found, turned, thresholds))
    assert not list(of_familiar_strangers([one for one in found if one.name != "knn"], turned, thresholds))


def test_copies_of_a_drawing_count_once_in_the_intervals_of_shares() -> None:
    accepted = np.array([1.0] * 30 + [-1.0] * 10)
    ids, drawings = [str(row) for row in range(40)], [str(row // 8) for row in range(40)]

    def decided(groups: list[str]) -> OwnDecision | None:
        known, far = (Scored(name, ids, groups, [0] * 40, [0] * 40, {OWN: accepted}) for name in ("known", "far"))
        return own_decision(known, [far])

    alone, copies = decided(ids), decided(drawings)
    assert alone is not None
    assert copies is not None
    for one, many in ((alone.accepted_known, copies.accepted_known), (alone.right, copies.right)):
        assert one.value == many.value == 0.75
        assert many.low < one.low < one.high < many.high
    assert copies.accepted_unknown["far"].low < alone.accepted_unknown["far"].low

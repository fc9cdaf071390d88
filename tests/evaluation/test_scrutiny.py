"""Which checks a run makes: by mode, once over all sessions, within a stated cost, for every goal."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attacking import Interrupt, outcomes, prepared
from PIL import Image

from robustvlm.attacks import PGD, parse_attacks
from robustvlm.commands.attack.checks import published
from robustvlm.commands.attack.effort import MOST_IMAGES, NAMES, PASSES_PER_IMAGE, choose_sample, short_attack
from robustvlm.commands.attack.summary import Summary
from robustvlm.commands.common.questions import SANITY_NAMES
from robustvlm.errors import UserError

MadeFolder = Callable[..., Path]
EXTRA = set(NAMES) - {"unconfirmed successes"}


def names(summary: Summary) -> set[str]:
    return {check.name for check in summary.checks}


def passes(summary: Summary) -> int:
    return summary.cost.forward_passes + summary.cost.backward_passes


@pytest.fixture
def photos(make_folder: MadeFolder) -> Path:
    return make_folder(24)


def test_modes_differ_in_what_they_ask_and_cost_but_not_in_the_rows(photos: Path) -> None:
    runs = {mode: prepared(photos, checks=mode, name=mode) for mode in ("none", "quick", "full")}
    summaries = {mode: run.run() for mode, run in runs.items()}
    asked = {mode: names(summary) for mode, summary in summaries.items()}
    assert not asked["none"] & {*SANITY_NAMES, *NAMES, "extra attacks"}
    assert asked["quick"] - asked["none"] == set(SANITY_NAMES)
    assert asked["full"] - asked["quick"] >= {"larger radius", "more steps", "huge radius", "extra attacks"}
    assert outcomes(runs["none"]) == outcomes(runs["quick"]) == outcomes(runs["full"])
    quick, full = (passes(summaries[mode]) - passes(summaries["none"]) for mode in ("quick", "full"))
    assert quick == 8 * (16 + 1 + 1)  # of a batch of 8: 16 forward, one backward, and one to know the clean output
    assert quick < full <= quick + MOST_IMAGES * PASSES_PER_IMAGE
    assert [check for check in summaries["full"].checks if check.level in ("warning", "fault")] == []


def test_unknown_modes_are_named(photos: Path) -> None:
    with pytest.raises(UserError, match=r"unknown checks 'ful'.*full"):
        prepared(photos, checks="ful")


@pytest.mark.equality
def test_an_interrupted_run_asks_only_what_is_left(photos: Path) -> None:
    whole = prepared(photos, checks="full", name="whole").run()
    done = 24 + whole.per_eps[0].per_attack[0].attacked + 2
    with pytest.raises(KeyboardInterrupt):
        prepared(photos, checks="full").run(Interrupt(done))
    run = prepared(photos, checks="full")
    resumed = run.run()
    assert {check.name: check.message for check in resumed.checks if check.name in EXTRA} == {
        check.name: check.message for check in whole.checks if check.name in EXTRA
    }
    lines = run.folder.journal_path.read_text().splitlines()
    for name in (*SANITY_NAMES, *EXTRA & names(whole)):
        assert sum(f'"name":"{name}"' in line.replace('": "', '":"') for line in lines) == 1


def test_where_nothing_withstood_there_is_nothing_to_doubt(photos: Path) -> None:
    summary = prepared(photos, checks="full", eps="40/255", attack="pgd:steps=20").run()
    (extra,) = [check for check in summary.checks if check.name == "extra attacks"]
    assert extra.level == "note"
    assert not names(summary) & set(NAMES)


@pytest.mark.parametrize(
    ("goal", "model"),
    [
        ("feature", "Encoder"),
        ("targeted:cat", "Encoder"),
        ("deny", "Encoder+reject:0.34"),
        ("misclassify", "Encoder+reject:0.6"),
    ],
)
def test_other_goals_are_checked_too_and_a_sound_model_raises_none(photos: Path, goal: str, model: str) -> None:
    summary = prepared(photos, model, checks="full", goal=goal, eps="1/255").run()
    assert "gradient as stated" in names(summary)
    assert [check for check in summary.checks if check.level in ("warning", "fault")] == []
    assert "huge radius" not in names(summary)


def test_images_of_unknown_classes_have_no_accuracy_in_any_range(
    tmp_path: Path, labelled_pictures: list[tuple[Image.Image, str]]
) -> None:
    data = []
    for image, _ in labelled_pictures[:20]:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data.append(buffer.getvalue())
    labels = ["cat", "dog", "fox", *[None] * 17]
    pq.write_table(pa.table({"image": data, "label": labels}), tmp_path / "mixed.parquet")
    source = f"parquet:{tmp_path / 'mixed.parquet'}"
    settings = {"checks": "full", "goal": "intrude", "eps": "1/255", "lanes": 16}
    summary = prepared(tmp_path / "x", "Encoder+reject:0.9", data=source, **settings).run()
    assert "gradient as stated" in names(summary)
    assert "input range" not in names(summary)
    assert [check for check in summary.checks if check.level in ("warning", "fault")] == []


def test_a_random_model_is_diagnosed_by_its_averages(photos: Path) -> None:
    summary = prepared(photos, "Random", checks="full", eot=2, draws=3, eps="1/255").run()
    levels = {check.name: check.level for check in summary.checks}
    assert levels["repeatable output"] == "note"
    assert "gradient as stated" not in levels
    assert levels["unconfirmed successes"] == "note"


def test_the_sample_is_balanced_and_fixed_by_the_seed() -> None:
    held, fell = [f"h{i}" for i in range(100)], [f"f{i}" for i in range(100)]
    sample = choose_sample(held, fell, seed=0)
    assert len(sample) == len(set(sample)) == MOST_IMAGES
    assert sum(name.startswith("h") for name in sample) == MOST_IMAGES // 2
    assert sample == choose_sample(held[::-1], fell[::-1], seed=0) != choose_sample(held, fell, seed=1)
    assert len(choose_sample(held, fell[:3], seed=0)) == MOST_IMAGES
    assert len(choose_sample(held[:3], fell, seed=0)) == MOST_IMAGES


def test_the_extra_attack_is_the_runs_own_made_short() -> None:
    assert short_attack(parse_attacks("square,apgd-t:steps=50,pgd")).objective.name == "dlr-t"
    assert short_attack(parse_attacks("apgd-t:steps=50")).n_runs(10) == 1
    for text in ("fgsm", "square"):
        attack = short_attack(parse_attacks(text))
        assert isinstance(attack, PGD)
        assert attack.n_iter == 10


def test_what_is_known_to_be_undefended() -> None:
    assert published("tiny")
    assert published("ViT-B-32/openai")
    assert not published("ViT-B-32/robust.safetensors")
    assert not published("tiny+smooth:0.25")
    assert not published("small_encoders:Encoder")

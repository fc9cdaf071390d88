"""Soups: the mean of weights, chosen greedily or not, and only of what is alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import OWN, clip_folder, pictures, prepared

from robustvlm.commands import soup as command
from robustvlm.commands.common.inputs import describe_data
from robustvlm.commands.common.lessons import Overlap, overlap
from robustvlm.commands.soup.work import Soup
from robustvlm.data import open_data
from robustvlm.defenses import load_pipeline
from robustvlm.defenses.finetune.saved import averaged, greedy
from robustvlm.errors import UserError
from robustvlm.models.saved import Card, write_card
from robustvlm.runs.run import FinishedRun


def soup(out: Path, models: list[str], **options: object) -> FinishedRun[Soup]:
    return command.soup(models, device="cpu", out=out, name="soup", fresh=True, **options)


def test_a_uniform_soup_of_runs_is_their_mean(tmp_path: Path) -> None:
    base = clip_folder(tmp_path / "base")
    for seed in (0, 1):
        prepared(tmp_path, model=str(base), name=f"run{seed}", seed=seed, steps=3).start()
    runs = [str(tmp_path / f"run{seed}") for seed in (0, 1)]
    made = soup(tmp_path, runs)
    a, b, mean = (load_pipeline(spec).state_dict() for spec in (*runs, str(made.folder)))
    assert max(float((a[name].float() - b[name].float()).abs().max()) for name in a) > 1e-3
    for name, value in mean.items():
        torch.testing.assert_close(value.float(), (a[name].float() + b[name].float()) / 2, rtol=0, atol=1e-6)
    assert [step.kept for step in made.summary.tasted] == [True, True]


def test_a_greedy_soup_leaves_out_what_harms_and_is_measured(tmp_path: Path) -> None:
    good, val = prepared(tmp_path, steps=40, name="good"), pictures(tmp_path / "val", each=8)
    good.start()
    run = soup(tmp_path, [OWN, str(good.folder.path)], method="greedy", by="clean", val=val, val_steps=3, eps=0.03)
    made = run.summary
    assert made.tasted[0].name == str(good.folder.path)
    assert made.measures["clean accuracy"].value == max(step.value for step in made.tasted if step.kept)
    if [step.kept for step in made.tasted] == [True, False]:
        pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(load_pipeline(str(run.folder)).encode_image(pixels), good.work.vlm.encode_image(pixels))


def test_the_radius_where_none_is_given_is_one_of_the_norm(tmp_path: Path) -> None:
    measured = {"val": pictures(tmp_path / "val", each=1), "val_steps": 1}
    found = [soup(tmp_path, [OWN, OWN], norm=norm, **measured).manifest["config"] for norm in ("Linf", "L2")]
    assert [(config["eps_text"], config["eps"]) for config in found] == [("1/255", 1 / 255), ("0.5", 0.5)]


def test_what_a_run_was_trained_on_is_no_data_to_choose_by(tmp_path: Path) -> None:
    run = prepared(tmp_path, steps=2, name="a")
    run.start()
    with pytest.raises(UserError, match=r"was trained on .*: pass val images that no run was trained on"):
        soup(tmp_path, [OWN, str(run.folder.path)], method="greedy", val=run.settings.data)


def lesson(folder: Path, base: str, spec: str, **config: object) -> str:
    """Write what a fine-tuning run says of itself."""
    folder.mkdir()
    data = {"spec": spec, "fingerprint": open_data(spec).fingerprint(), "images": len(open_data(spec).ids() or ())}
    manifest = {"kind": "finetune", "config": {"limit": None} | config, "data": data}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_card(folder, Card("finetune", base=base))
    return str(folder)


def test_images_that_taught_a_run_below_are_refused_by_their_ids_and_drawings(tmp_path: Path) -> None:
    first = lesson(tmp_path / "first", "tiny", "emoji?split=train&copies=1", limit=12)
    again = lesson(tmp_path / "again", first, pictures(tmp_path / "pictures", each=1))
    (tmp_path / "made").mkdir()
    made = str(tmp_path / "made")
    write_card(tmp_path / "made", Card("soup", base="tiny", settings={"models": ["tiny", again]}))
    for spec in (first, again, made):
        with pytest.raises(UserError, match=r"first' was trained on \d\d images of 'emoji.* \(the first, 'emoji/.*/0'"):
            soup(tmp_path, [OWN, spec], val="emoji?split=train")
    with pytest.raises(UserError, match="again' was trained on 'imagefolder"):
        soup(tmp_path, [OWN, made], val=f"imagefolder:{tmp_path / 'pictures'}")
    copies = open_data("emoji?split=train&copies=4")
    found = overlap([made], copies, None).taught
    assert found is not None
    assert len(found[1]) == 48, "12 drawings of 4 copies, one of which was trained on"
    assert overlap([made], open_data("emoji?split=test"), None) == Overlap()


def test_shards_on_the_net_taught_a_model_only_where_they_lie(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    classes = tmp_path / "names.txt"
    classes.write_text("cat\ndog\n")
    taught = open_data("wds:https://one.invalid/{0..3}.tar", classes=classes)
    made = lesson(tmp_path / "made", "tiny", "emoji")
    manifest = json.loads((tmp_path / "made/manifest.json").read_text()) | {"data": describe_data(taught)}
    (tmp_path / "made/manifest.json").write_text(json.dumps(manifest))
    assert overlap([made], taught, None).taught is not None
    elsewhere = open_data("wds:https://other.invalid/{0..3}.tar", classes=classes)
    (said,) = overlap([made], elsewhere, None).remarks
    assert "cannot be told" in said
    assert "shards of the same names at another address" in said
    del manifest["data"]["content"]  # as versions before wrote it: names are all there is
    (tmp_path / "made/manifest.json").write_text(json.dumps(manifest))
    assert overlap([made], elsewhere, None).taught is not None


def test_images_that_chose_weights_are_told_and_so_is_what_cannot_be_compared(tmp_path: Path) -> None:
    val, run = pictures(tmp_path / "val", each=5), prepared(tmp_path, val=pictures(tmp_path / "other", each=4), steps=1)
    run.start()
    made = soup(tmp_path, [OWN, str(run.folder.path)], val=run.settings.val)
    assert made.manifest["remarks"] == [
        f"the images of --val chose the weights of '{run.folder.path}': figures on them are a little too high"
    ]
    assert "remarks" not in soup(tmp_path, [OWN, str(run.folder.path)], val=val).manifest
    (tmp_path / "pictures").rename(tmp_path / "moved")
    told = soup(tmp_path, [OWN, str(run.folder.path)], val=val).manifest["remarks"]
    assert [remark.endswith("is not there any more") for remark in told] == [True]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ([OWN], {}, "made of at least 2 models, got 1"),
        ([OWN, "small:wide"], {}, r"'small:Own' and 'small:wide' are of different architectures \('.*' is \[12, 192\]"),
        ([OWN, "tiny"], {}, "are of different architectures .'.*' is only in "),
        ([OWN, OWN], {"method": "greedy"}, "chosen on images: pass val=DATA"),
        ([OWN, OWN], {"method": "greed"}, "unknown method 'greed': did you mean 'greedy'"),
        ([OWN, OWN], {"by": "speed"}, "unknown measure 'speed'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, models: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        soup(tmp_path, models, **options)


@pytest.mark.parametrize("change", [("model_cfg", "quick_gelu", False), ("preprocess_cfg", "mean", [0.1, 0.2, 0.3])])
def test_models_that_are_other_functions_of_their_weights_are_refused(
    tmp_path: Path, change: tuple[str, str, object]
) -> None:
    one, other = clip_folder(tmp_path / "one"), clip_folder(tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    part, key, value = change
    config[part][key] = value
    (other / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="are not one function of their weights"):
        soup(tmp_path, [str(one), str(other)])


def test_runs_of_different_models_are_refused_and_a_run_of_a_run_is_not(tmp_path: Path) -> None:
    bases = [str(clip_folder(tmp_path / f"base{seed}", seed=seed)) for seed in (0, 1)]
    for i, base in enumerate(bases):
        prepared(tmp_path, model=base, name=f"run{i}", steps=2).start()
    prepared(tmp_path, model=str(tmp_path / "run0"), name="again", steps=2).start()
    with pytest.raises(UserError, match="were tuned from different models: a soup needs one"):
        soup(tmp_path, [str(tmp_path / "run0"), str(tmp_path / "run1")])
    made = soup(tmp_path, [str(tmp_path / "run0"), str(tmp_path / "again")])
    assert len(made.summary.tasted) == 2


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_a_greedy_soup_is_never_worse_than_its_best_part(values: list[float], goal: float) -> None:
    states = [(str(i), {"w": torch.tensor([value], dtype=torch.float64)}) for i, value in enumerate(values)]

    def measure(state: dict[str, torch.Tensor]) -> float:
        return -abs(float(state["w"]) - goal)

    made, steps = greedy(states, measure)  # type: ignore[arg-type]
    assert measure(made) >= max(measure(state) for _, state in states)
    assert len(steps) == len(values)
    kept = [state for name, state in states if name in {step.name for step in steps if step.kept}]
    torch.testing.assert_close(averaged(kept)["w"], made["w"])

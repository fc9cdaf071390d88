"""Certify runs look at images: what draws new noise, what is counted, and what of it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certifying import prepared, replayed, rows
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import binom

from robustvlm.commands.certify.config import LEDGER, read_looks, record_look
from robustvlm.errors import UserError

MakeFolder = Callable[..., Path]


def seeds(run: Any) -> dict[str, int]:
    """Return the seed of the estimation noise by image."""
    return {row["image_id"]: json.loads(row["certificate"])["provenance"]["seeds"]["estimation"] for row in rows(run)}


@pytest.mark.parametrize(
    "change",
    [
        {"classes": '{"cat": "kitten", "dog": "dog", "fox": "fox"}'}, {"templates": "a drawing of a {}\n"},
        {"claim": "vote"}, {"sigma": 0.06},
        {"samples": 320}, {"alpha": 0.02}, {"radius": 0.01}, {"seed": 1}, {"precision": "fp64"},
        {"model": "Encoder+smooth:0.05:8"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_settings_that_could_be_chosen_after_a_look_draw_other_noise(
    make_folder: MakeFolder, tmp_path: Path, change: dict[str, Any]
) -> None:
    photos = make_folder(2)
    for name in ("classes", "templates"):
        if name in change:
            path = tmp_path / ("classes.json" if name == "classes" else "templates.txt")
            path.write_text(change[name])
            change = {name: path}
    with_other_prompts = "templates" in change
    model = change.pop("model", "Encoder")
    first, second = prepared(photos), prepared(photos, model, name="other", **{"sigma": 0.05, **change})
    first.summary()
    second.summary()
    assert set(seeds(first).values()).isdisjoint(seeds(second).values())
    records = [json.loads(rows(run)[0]["certificate"]) for run in (first, second)]
    assert (records[0]["prompts"] != records[1]["prompts"]) == with_other_prompts
    trail = second.folder.manifest()["trail"]  # type: ignore[index]
    assert prepared(photos).manifest["trail"]["looks"] == 2
    assert (first.manifest["trail"]["looks"], second.manifest["trail"]["looks"]) == (1, 1)  # none had run yet
    assert trail["look"]["look"] != first.manifest["trail"]["look"]["look"]


def test_what_decides_nothing_draws_the_same_noise_and_is_no_new_look(make_folder: MakeFolder) -> None:
    photos = make_folder(3)
    first = prepared(photos, limit=2)
    first.summary()
    second = prepared(photos, name="more", lanes=32, at="0.01,0.02", cache="float32")
    assert second.manifest["trail"]["looks"] == 1
    second.summary()
    assert seeds(first).items() <= seeds(second).items()
    assert len(read_looks(photos.parent / "runs")) == 1
    for row in rows(first):
        assert row["radius"] in [other["radius"] for other in rows(second)]


def test_other_pixels_under_the_same_name_draw_other_noise(make_folder: MakeFolder) -> None:
    from PIL import Image

    photos = make_folder(2)
    first = prepared(photos)
    first.summary()
    path = min(photos.glob("*/*.png"))
    Image.open(path).point(lambda value: 255 - value).save(path)
    second = prepared(photos, name="retouched")
    second.summary()
    changed = [name for name, seed in seeds(second).items() if seeds(first)[name] != seed]
    assert len(changed) == 1
    assert path.stem in changed[0]


def test_looks_are_counted_over_deleted_and_fresh_runs(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    runs = photos.parent / "runs"
    for alpha in (0.01, 0.02, 0.03, 0.02):
        prepared(photos, alpha=alpha).summary(fresh=True)
    assert len(read_looks(runs)) == 3
    last = prepared(photos, alpha=0.04, name="last")
    assert last.manifest["trail"]["looks"] == 4
    last.summary()
    from robustvlm.commands.certify.view import write_certify_report

    text = write_certify_report(last.folder.path).read_text(encoding="utf-8")
    assert "4 looks at these images" in text
    assert "with up to 4 times that" in text
    assert json.loads(last.folder.summary_path.read_text())["looks"] == 4


def test_a_model_that_changed_where_no_digest_looks_is_another_look(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    first = prepared(photos)
    first.summary()
    ledger = photos.parent / "runs" / LEDGER
    (line,) = read_looks(ledger.parent)
    line["probe"]["parts"]["image features"]["values"][0][0] += 0.1
    for changed, looks in (("", 1), (json.dumps(line), 2), (json.dumps(line | {"probe": {"format": 1}}), 2)):
        if changed:
            ledger.write_text(changed + "\n")
        again = prepared(photos, name="again")
        trail = again.manifest["trail"]
        assert (trail["looks"], trail["same_noise"]) == (looks, looks)
        record_look(again.folder, trail)
        assert len(read_looks(ledger.parent)) == looks


def test_kept_features_count_as_looks_at_the_same_noise(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    first = prepared(photos, cache="float32")
    first.summary()
    for number, prompts in enumerate(("independent", "adaptive")):
        again = replayed(photos, prompts=prompts, name=f"r{number}")
        assert again.manifest["trail"]["same_noise"] == again.manifest["trail"]["looks"] == number + 2
        again.summary()
        assert again.config.alpha == 0.01  # that of the features' run
        assert seeds(again) == seeds(first)
    with pytest.raises(UserError, match=r"that of their run, 0\.01: leave out alpha"):
        replayed(photos, alpha=0.5)


def test_a_run_from_before_settings_were_in_the_noise_is_not_gone_on_with(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    run = prepared(photos)
    run.summary()
    old = json.loads(run.folder.manifest_path.read_text())
    del old["config"]["noise"], old["trail"]
    run.folder.manifest_path.write_text(json.dumps(old))
    run.folder.summary_path.unlink()
    with pytest.raises(UserError, match="noise: None -> "):
        prepared(photos).summary()


def test_the_ledger_is_no_way_into_other_files(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder(2)
    run = prepared(photos)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (photos.parent / "runs").mkdir(exist_ok=True)
    (photos.parent / "runs" / LEDGER).symlink_to(victim)
    with pytest.raises(UserError, match="cannot write"):
        record_look(run.folder, run.manifest["trail"])
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("line", ["[1]", "{", "null", '{"images": 3}', "[" * 100_000, "\x00"])
def test_lines_that_are_no_looks_are_left_out(tmp_path: Path, line: str) -> None:
    (tmp_path / LEDGER).write_text(line + "\n")
    assert read_looks(tmp_path) == []


@pytest.mark.parametrize("claim", ["feature", "class", "vote"])
def test_the_copies_of_a_smoothed_model_fill_the_deployed_column(make_folder: MakeFolder, claim: str) -> None:
    photos = make_folder(2)
    few = prepared(photos, "Encoder+smooth:0.05:4", sigma=None, claim=claim, name="few")
    many = prepared(photos, "Encoder+smooth:0.05:100000", sigma=None, claim=claim, name="many")
    shown = few.summary()
    assert (few.config.deployed, many.summary().deployed_n0) == (4, 100_000)
    # Four copies decide nothing by their mean. A vote needs a share at which two of them or fewer are rare.
    share = brentq(lambda q: float(binom.cdf(2, 4, q)) - few.config.alpha, 0.5, 1.0)
    for row in rows(few):
        kept = max(0.0, row["radius"] - 0.05 * float(ndtri(share))) if claim == "vote" else 0.0
        assert row["deployed_radius"] == pytest.approx(kept, abs=1e-6)
    assert claim != "vote" or all(0.0 < row["deployed_radius"] < 0.5 * row["radius"] for row in rows(few))
    assert all(0.9 * row["radius"] <= row["deployed_radius"] <= row["radius"] for row in rows(many))
    assert shown.methods[1].column == "deployed_radius"
    assert "infinitely many" in shown.rule
    assert "4 fresh" in shown.deployed
    record = json.loads(rows(few)[0]["certificate"])
    assert (record["deployed_radius"], record["provenance"]["deployed_n0"]) == (rows(few)[0]["deployed_radius"], 4)
    assert (few.folder.path / "certificates.jsonl").read_text().splitlines() == [r["certificate"] for r in rows(few)]
    with pytest.raises(UserError, match="is deployed with 4 copies, and deployed says 64"):
        prepared(photos, "Encoder+smooth:0.05:4", sigma=None, claim=claim, deployed=64)


def test_an_open_set_run_of_a_smoothed_model_says_that_its_copies_are_not_covered(make_folder: MakeFolder) -> None:
    photos = make_folder(6)
    run = prepared(photos, "Encoder+smooth:0.05:4", sigma=None, claim="openset", tau=0.1, limit=2)
    summary = run.summary()
    assert "with 4 copies, this run states nothing" in summary.deployed

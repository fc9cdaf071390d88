"""Kept features: other prompts and classes certified from them, and what they are refused for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from certifying import Watch, prepared, replayed, rows
from safetensors.numpy import load_file

from robustvlm.commands.certify.encoder import cache_bytes, rounding_error
from robustvlm.errors import UserError

MakeFolder = Callable[..., Path]


def test_kept_features_give_the_same_certificates(make_folder: MakeFolder) -> None:
    photos = make_folder(4)
    first = prepared(photos, cache="float32")
    first.summary()
    second = replayed(photos, prompts="independent", name="again")
    watch = Watch()
    second.summary(watch)
    assert watch.passes == 0
    assert "up to 0 encoder passes" in watch.said[0]
    skipped = ("seconds", "passes", "mean_radius")
    assert rows(second, without=skipped) == rows(first, without=skipped)
    assert all(row["passes"] == 0 for row in pq.read_table(second.folder.results_path).to_pylist())


def test_half_precision_and_adaptive_prompts_cost_radius(make_folder: MakeFolder) -> None:
    photos = make_folder(4)
    exact = prepared(photos, sigma=0.02, samples=600)
    exact.summary()
    prepared(photos, sigma=0.02, samples=600, name="half", cache="float16").summary()
    half = replayed(photos, "half", prompts="independent", name="half-independent")
    half.summary()
    ball = replayed(photos, "half", name="half-adaptive")
    ball.summary()
    assert ball.config.prompts == "adaptive"
    assert "chosen after looking" in ball.manifest["plan"]["notes"][0]
    for mine, rounded, any_prompts in zip(rows(exact), rows(half), rows(ball), strict=True):
        assert mine["prediction"] == rounded["prediction"]
        assert rounded["radius"] <= mine["radius"]
        assert any_prompts["radius"] < rounded["radius"] or rounded["radius"] == 0.0
    assert sum(row["radius"] for row in rows(half)) > 0.8 * sum(row["radius"] for row in rows(exact))


def test_classes_drawn_from_candidates_cost_less_than_any_prompts(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder(4)
    prepared(photos, sigma=0.02, samples=1000, cache="float32").summary()
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    names = ["cat", "dog", "fox"]
    few.write_text("\n".join([*names, "wolf"]))
    many.write_text("\n".join([*names, *(f"thing {i}" for i in range(5000))]))
    radius = {}
    for name, options in {
        "fixed": {"prompts": "independent"}, "few": {"candidates": few}, "many": {"candidates": many}, "any": {},
    }.items():  # fmt: skip
        run = replayed(photos, name=name, **options)
        run.summary()
        radius[name] = [row["radius"] for row in rows(run)]
        if "candidates" in options:
            assert run.config.prompts == "candidates"
            assert "every list of classes that is drawn from them" in run.manifest["plan"]["notes"][0]
            proof = json.loads(rows(run)[0]["certificate"])["provenance"]
            assert proof["bound"] == {"few": "ell", "many": "index"}[name]
    for fixed, some, more in zip(radius["fixed"], radius["few"], radius["many"], strict=True):
        assert fixed > some > more or fixed == 0.0
    assert sum(radius["few"]) > sum(radius["any"])


def test_candidates_that_are_none_are_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder(2)
    prepared(photos, cache="float32").summary()
    names = tmp_path / "names.txt"
    for content, message in (("wolf\nfox", "is none of the 2 candidates"), ("a\na", "must differ"), ("a", ".")):
        names.write_text(content)
        with pytest.raises(UserError, match=message):
            replayed(photos, candidates=names)
    names.write_text("a\nb")
    with pytest.raises(UserError, match="candidates is for"):
        replayed(photos, candidates=names, prompts="independent")
    with pytest.raises(UserError, match="candidates is for"):
        prepared(photos, candidates=names)


def test_how_many_copies_would_do_is_said_beforehand(make_folder: MakeFolder) -> None:
    photos = make_folder(4)
    prepared(photos, sigma=0.02, samples=60, cache="float32").summary()
    watch = Watch()
    replayed(photos, name="few").summary(watch)
    assert any("copies an image would certify a radius for half" in line for line in watch.said)


def test_new_classes_find_their_images_by_name(make_folder: MakeFolder, tmp_path: Path) -> None:
    photos = make_folder(6)
    first = prepared(photos, cache="float32")
    first.summary()
    names = tmp_path / "other.txt"
    names.write_text("wolf\nDog\ncat\n")
    other = replayed(photos, alpha=0.01, classes=names, name="other")
    summary = other.summary()
    old = {row["index"]: first.manifest["data"]["class_names"][row["label"]] for row in rows(first)}
    new = {"cat": 2, "dog": 1, "fox": -1}
    assert {row["index"]: row["label"] for row in rows(other)} == {index: new[name] for index, name in old.items()}
    assert all((row["correct"] is None) == (row["label"] < 0) for row in rows(other))
    assert summary.correct is not None
    assert summary.correct.total == sum(name != "fox" for name in old.values())


def test_kept_features_are_whole_and_of_the_size_foretold(make_folder: MakeFolder) -> None:
    run = prepared(make_folder(3), cache="float16")
    watch = Watch()
    run.summary(watch)
    files = sorted(run.folder.features_path.iterdir())
    assert len(files) == 3
    assert "3 images, at most 300 samples each: up to 900 encoder passes" in watch.said[0]
    assert "kept features take 0.0 MB" in watch.said[0]
    assert watch.passes >= 900
    kept = [load_file(path) for path in files]
    assert sum(array.nbytes for one in kept for array in one.values()) == cache_bytes(3, 300, 12, "float16")
    tensors = kept[0]
    assert {name: (array.shape, array.dtype) for name, array in tensors.items()} == {
        "pilot": ((150, 12), np.float16),
        "estimation": ((150, 12), np.float16),
    }


def test_the_bound_of_rounding_holds() -> None:
    draws = np.random.default_rng(0)
    for dim in (2, 12, 512, 1024):
        for scale in (1.0, 30.0):  # even and very uneven entries
            rows = draws.normal(size=(500, dim)) * np.exp(scale * draws.normal(size=(500, dim)) / 10)
            unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
            kept = unit.astype(np.float16).astype(np.float64)
            back = kept / np.linalg.norm(kept, axis=1, keepdims=True)
            assert np.linalg.norm(back - unit, axis=1).max() <= rounding_error("float16", dim)


def test_damaged_or_foreign_features_are_refused(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    run = prepared(photos, cache="float32")
    run.summary()
    one, two = sorted(run.folder.features_path.iterdir())
    whole = one.read_bytes()
    for content in (whole[:100], two.read_bytes()):
        one.write_bytes(content)
        again = replayed(photos, name="again")
        with pytest.raises(UserError, match="make them again"):
            again.summary(fresh=True)


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({"claim": "vote"}, "independent", "float32"),
        ({"claim": "class", "radius": 0.1}, None, "leave out radius"),
        ({"claim": "class"}, "any", "adaptive or independent"),
        ({"claim": "class", "cache": "float16"}, None, "leave out cache"),
    ],
)
def test_what_kept_features_cannot_certify_is_refused(
    make_folder: MakeFolder, options: dict[str, Any], prompts: str | None, message: str
) -> None:
    photos = make_folder(2)
    prepared(photos, cache="float16").summary()
    with pytest.raises(UserError, match=message):
        replayed(photos, prompts=prompts, **options)


def test_votes_over_prompts_chosen_by_the_features_are_refused(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    prepared(photos, cache="float32").summary()
    with pytest.raises(UserError, match="prompts=independent if they were"):
        replayed(photos, claim="vote")
    assert replayed(photos, claim="vote", alpha=0.01, prompts="independent").summary().images == 2
    with pytest.raises(UserError, match=r"'?claim=joint'?.* only for prompts and settings that were fixed"):
        replayed(photos, claim="joint", min_cos=0.5)
    feature = replayed(photos, claim="feature", alpha=0.01).summary()
    assert [method.column for method in feature.methods] == ["radius"]  # the clean feature was not kept


def test_runs_without_kept_features_cannot_be_judged_again(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    run = prepared(photos)
    with pytest.raises(UserError, match="no run 'nothing'"):
        replayed(photos, "nothing")
    run.summary()
    with pytest.raises(UserError, match="kept no features"):
        replayed(photos)


def test_kept_features_are_not_said_to_be_of_other_noise(make_folder: MakeFolder) -> None:
    photos = make_folder(2)
    prepared(photos, sigma=0.02, samples=200, cache="float32").summary()
    for other in ({"threat": "brightness"}, {"sigma": 0.5}, {"samples": 50}, {"seed": 3}, {"precision": "fp64"}):
        with pytest.raises(UserError, match="not what the kept features were made with"):
            replayed(photos, prompts="independent", name="other", **other)
    same = replayed(photos, prompts="independent", name="same", sigma=0.02, samples=200, threat="l2")
    assert same.config.sigma == 0.02


def test_a_model_with_class_vectors_of_its_own_is_judged_by_no_others(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, names = make_folder(4), tmp_path / "names.txt"
    prepared(photos, cache="float32").summary()
    names.write_text("cat\ndog\nfox\n")

    class Own:
        refuses = False

        def class_vectors(self, names: Any) -> Any:
            return np.eye(len(names))

    monkeypatch.setattr("robustvlm.commands.certify.materials.saved_model", lambda *_: Own())
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}\n")
    for option, file in (("classes", names), ("templates", templates), ("candidates", names)):
        with pytest.raises(UserError, match=f"vectors of its own and by no texts: leave out {option}"):
            replayed(photos, name=option, **{option: file})

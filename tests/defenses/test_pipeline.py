"""Specs with operators: how they are read, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustvlm.defenses import SmoothedVLM, load_pipeline, split_spec
from robustvlm.defenses.specs import Operation
from robustvlm.errors import UserError


def test_a_spec_without_operators_is_the_plain_model() -> None:
    vlm = load_pipeline("tiny")
    assert not isinstance(vlm, SmoothedVLM)
    assert vlm.spec == "tiny"


def test_smooth_is_applied_with_its_arguments() -> None:
    vlm = load_pipeline("tiny+smooth:0.12:4")
    assert isinstance(vlm, SmoothedVLM)
    assert (vlm.sigma, vlm.n0, vlm.spec, vlm.image_size) == (0.12, 4, "tiny+smooth:0.12:4", 64)
    assert load_pipeline("tiny+smooth:.12").spec == "tiny+smooth:0.12:64"
    assert vlm.encode_image(torch.rand(1, 3, 32, 32)).shape[0] == 1


@pytest.mark.parametrize(
    ("spec", "base", "operations"),
    [
        ("tiny", "tiny", ()),
        ("ViT-B-32/runs/a+b.safetensors", "ViT-B-32/runs/a+b.safetensors", ()),
        ("a:b+smooth:0.1", "a:b", (Operation("smooth", ("0.1",)),)),
        ("tiny+smooth:0.1+reject:0.2", "tiny", (Operation("smooth", ("0.1",)), Operation("reject", ("0.2",)))),
        ("tiny+smooth:1e-1:8", "tiny", (Operation("smooth", ("1e-1", "8")),)),
    ],
)
def test_where_a_spec_is_split(spec: str, base: str, operations: tuple[Operation, ...]) -> None:
    assert split_spec(spec) == (base, operations)


def test_a_folder_with_a_plus_sign_is_one_name(tmp_path: Path) -> None:
    folder = tmp_path / "clip+smooth"
    folder.mkdir()
    assert split_spec(str(folder)) == (str(folder), ())
    assert split_spec(f"{folder}+smooth:0.1")[0] == str(folder)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tiny+smoth:0.25", "did you mean 'smooth'"),
        ("tiny+zzzz", "unknown operator '\\+zzzz'"),
        ("tiny+smooth", "must be written \\+smooth:\\[THREAT=\\]SIGMA"),
        ("tiny+smooth:0.25:8:9", "from 1e-100 to 0.5, got 9"),
        ("tiny+smooth:much", "sigma must be a number, got 'much'"),
        ("tiny+smooth:0", "sigma must be above 0"),
        ("tiny+smooth:-1", "sigma must be above 0"),
        ("tiny+smooth:0.25:0", "between 1 and"),
        ("tiny+smooth:0.25:-3", "whole number, got '-3'"),
        ("tiny+smooth:0.25:1.5", "whole number, got '1.5'"),
        ("+smooth:0.25", "names no model"),
        ("tinny+smooth:0.25", "did you mean 'tiny'"),
    ],
)
def test_wrong_specs_are_explained_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_pipeline(spec)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_found_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustvlm.defenses.pipeline.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="sigma"):
        load_pipeline("tiny+smooth:x")

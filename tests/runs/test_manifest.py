"""The manifest: what it holds, and what keeps a run from being continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustvlm.errors import UserError
from robustvlm.runs.manifest import describe_device, differences, is_manifest, make_manifest, require_same, versions

SETTINGS: dict[str, Any] = {
    "model": "tiny",
    "data": "emoji",
    "attack": ["pgd"],
    "norm": "Linf",
    "eps": [2 / 255],
    "eps_text": ["2/255"],
    "steps": None,
    "restarts": None,
    "limit": 10,
    "seed": 0,
    "lanes": 64,
    "device": "cpu",
    "precision": "fp32",
    "save_adversarial": False,
    "resolution": 64,
}


def manifest(**changes: Any) -> dict[str, Any]:
    return make_manifest(
        kind="attack",
        name="n",
        command="robustvlm attack",
        config=SETTINGS | changes,
        model={"spec": "tiny", "fingerprint": "aa", "logit_scale": 100.0},
        data={"spec": "emoji", "fingerprint": "bb", "class_names": ["cat", "dog"], "superclasses": None},
    )


def test_it_survives_the_way_through_a_file_unchanged() -> None:
    made = manifest(eps=[1 / 255, 0.1], eps_text=["1/255", "0.1"])
    assert json.loads(json.dumps(made, ensure_ascii=False)) == made
    assert differences(json.loads(json.dumps(made)), made) == []
    assert is_manifest(made)


def test_it_names_the_versions_and_the_hardware() -> None:
    made = manifest()
    assert {"python", "torch"} <= made["versions"].keys()
    assert made["versions"] == versions()
    assert "CPU" in made["device"] == describe_device("cpu")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("seed", 1, "seed: 0 -> 1"),
        ("eps", [0.5], "eps: [0.00784"),
        ("lanes", 1, "lanes: 64 -> 1"),
        ("limit", None, "limit: 10 -> None"),
        ("attack", ["apgd-ce"], "attack: ['pgd'] -> ['apgd-ce']"),
        ("save_adversarial", True, "save_adversarial: False -> True"),
    ],
)
def test_a_changed_setting_is_refused_by_name(key: str, value: object, shown: str) -> None:
    old, new = manifest(), manifest(**{key: value})
    with pytest.raises(UserError) as caught:
        require_same(old, new, Path("runs/n"))
    assert shown in str(caught.value)
    assert "runs/n" in str(caught.value)
    assert "--name" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_every_difference_is_named_and_long_values_are_cut() -> None:
    old, new = manifest(), manifest(seed=1, norm="L2")
    new["model"] = old["model"] | {"fingerprint": "cc"}
    new["data"] = old["data"] | {"class_names": [f"class {i}" for i in range(1000)]}
    found = differences(old, new)
    assert [line.partition(":")[0] for line in found] == ["norm", "seed", "model fingerprint", "data class_names"]
    assert max(map(len, found)) < 200


@pytest.mark.parametrize("key", ["created", "command", "name", "versions", "device", "git_commit"])
def test_what_does_not_decide_results_may_change(key: str) -> None:
    require_same(manifest(), manifest() | {key: "other"}, Path("x"))


def test_a_file_whose_content_has_changed_is_refused_and_one_without_a_digest_is_not() -> None:
    base = manifest()
    old, new = base | {"named_files": {"tree": "aa", "near_names": "bb"}}, base | {"named_files": {"tree": "cc"}}
    with pytest.raises(UserError, match="tree: other content of the same name") as caught:
        require_same(old, new, Path("x"))
    assert "near_names" not in str(caught.value)
    require_same(base, new, Path("x"))
    require_same(old, base, Path("x"))


def test_a_certificate_is_not_gone_on_with_by_another_bound_but_still_read() -> None:
    old, new = manifest() | {"plan": {"bound": "index"}}, manifest() | {"plan": {"bound": "ell"}}
    with pytest.raises(UserError, match="bound: index -> ell"):
        require_same(old, new, Path("x"))
    require_same(old, new, Path("x"), finished=lambda: True)
    require_same(old, old, Path("x"), finished=lambda: pytest.fail("asked where nothing depends on it"))


def test_a_setting_that_an_older_version_did_not_know_counts_as_changed() -> None:
    old = manifest()
    del old["config"]["lanes"]
    assert differences(old, manifest()) == ["lanes: None -> 64"]


@pytest.mark.parametrize("content", [None, [], 3, "format", {}, {"name": "a web app", "version": 3}, {"format": 1}])
def test_other_programs_manifests_are_told_apart(content: object) -> None:
    assert not is_manifest(content)


def test_other_content_is_other_data_as_far_as_both_manifests_tell() -> None:
    before, now, changed = manifest(), manifest(), manifest()
    now["data"] = before["data"] | {"content": "ab", "val": {"fingerprint": "cd", "content": "ef"}}
    before["data"] = before["data"] | {"val": {"fingerprint": "cd"}}
    changed["data"] = now["data"] | {"content": "00"}
    assert differences(before, now) == differences(now, before) == []
    assert differences(now, changed) == ["data content: ab -> 00"]
    changed["data"] = now["data"] | {"val": {"fingerprint": "cd", "content": "11"}}
    (told,) = differences(now, changed)
    assert told.startswith("data val: ")

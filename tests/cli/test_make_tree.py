"""`robustvlm data --make-tree`: a tree by a language model on loopback, in a file to edit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from robustvlm.cli.inspect import data
from robustvlm.errors import UserError
from robustvlm.llm.client import open_client

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))
from scripted import completion, serving


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    for name in ("ROBUSTVLM_LLM_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("robustvlm.llm.transport.platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    for label in ("cat", "dog", "bus"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / label / "0.png")
    app = typer.Typer()
    app.command()(data)

    def run(*arguments: str):  # type: ignore[no-untyped-def]
        spec = f"imagefolder:{tmp_path / 'photos'}"
        return CliRunner().invoke(app, [spec, *arguments], catch_exceptions=False, env={"COLUMNS": "200"})

    return run


def test_a_made_tree_is_written_shown_and_read_back(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    groups = completion({"groups": [{"domain": "animal", "group": "pet"}, {"domain": "thing", "group": "vehicle"}]})
    members = {"cat": "pet", "dog": "pet", "bus": "vehicle"}
    placed = completion({"members": [{"name": name, "group": group} for name, group in members.items()]})
    out = tmp_path / "tree.json"
    with serving(groups, placed) as script:
        options = ("--make-tree", "llm", "--out", str(out), "--llm", script.url, "--llm-model", "m")
        result = call(*options, "--llm-prices", "1,2", "--json")
        assert call(*options).exit_code == 0  # from the cache
        assert len(script.requests) == 2
    assert "2 requests" in result.stderr
    assert "cost 0.0003" in result.stderr
    assert [tree["root"] for tree in json.loads(result.stdout)["trees"]] == ["kind of thing"]
    assert json.loads(call("--tree", str(out), "--json").stdout)["trees"] == json.loads(result.stdout)["trees"]


def test_half_of_what_is_needed_is_a_user_error(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=r"say which with --out trees\.json"):
        call("--make-tree", "llm")
    with pytest.raises(UserError, match=r"say which with --out trees\.json"):
        call("--make-tree", "llm", "--out", str(tmp_path / "tree.csv"))
    with pytest.raises(UserError, match="needs llm=URL and llm_model=NAME"):
        call("--make-tree", "llm", "--out", str(tmp_path / "tree.json"))
    with pytest.raises(UserError, match="llm=URL and llm_model=NAME belong together"):
        open_client("http://localhost/v1", None)

"""The zoo's benchmark keeps figures of one version of the program, as a run gone on with by another mixes two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.zoo.__main__ import judge
from robustvlm.errors import UserError


def test_a_run_of_two_versions_makes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = SimpleNamespace(model_dump_json=lambda **_: "{}")
    manifest: dict[str, Any] = {"versions": {}, "git_commit": "a" * 40}
    found = SimpleNamespace(summary=summary, manifest=manifest, folder=tmp_path)
    monkeypatch.setattr("robustvlm.judge", lambda *_, **__: found)
    judge("tiny", None, "tiny", "filters", "1/255", limit=1, out=tmp_path)
    assert (tmp_path / "tiny-1of255-filters.json").read_text() == "{}\n"
    manifest["sessions"] = [{"versions": {}, "git_commit": "b" * 40}]
    with pytest.raises(UserError, match=r"several versions, aaaaaaaa and bbbbbbbb: delete it"):
        judge("tiny", None, "other", "filters", "1/255", limit=1, out=tmp_path)
    assert not (tmp_path / "other-1of255-filters.json").exists()

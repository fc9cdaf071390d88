"""Default names of runs: a name holds a digest of settings and facts, and a run is found again by it.

The names are those that the program comes to by itself, on the bundled model and images; it is stopped where it would
open the folder. What decides them is the same on every machine: settings, digests of weights and images, and the
device, which is a setting and given here. Versions, the device's name and the answers to probes are in no name.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from make_before import call

from robustvlm.errors import UserError
from robustvlm.runs.folder import RunFolder

NAMES = [line.split(" ", 1) for line in (Path(__file__).parent / "names.txt").read_text("utf-8").splitlines()]
"""Each line of the file: the name, a space, and the command."""


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that would have been opened."""
    names: list[str] = []

    def stop(self: RunFolder, *_: object, **__: object) -> Any:
        names.append(self.name)
        raise UserError("here work begins")

    monkeypatch.setattr(RunFolder, "opened", stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("wolf\nfox\n")
    (tmp_path / "prompts.txt").write_text("a drawing of a {}\n")
    return names


@pytest.mark.parametrize(("name", "command"), NAMES)
def test_a_run_has_the_name_it_had(name: str, command: str, opened: list[str]) -> None:
    assert call([*shlex.split(command), "--device", "cpu"]) == 2
    assert opened == [name]

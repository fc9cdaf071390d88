"""Makes the helper module importable; a place of its own and a way to call the program, for every test that asks."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robustvlm.cli.main import main

if TYPE_CHECKING:
    from command_line import Call, Ended

sys.path.insert(0, str(Path(__file__).parent))

OTHERS = """
class Coupled(Mean):
    def encode_image(self, pixels):
        return pixels.mean((2, 3)) * pixels.mean() if len(pixels) < 3 else pixels.mean((2, 3)) - pixels.mean((0, 2, 3))

class Detached(Mean):
    def encode_image(self, pixels):
        return super().encode_image(pixels.detach())

class Half:
    image_size = 8

class Ten:
    image_size = 8

    def forward(self, pixels):
        return pixels.mean((2, 3)).repeat(1, 4)[:, :10]
"""


@pytest.fixture
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder and a cache of the test's own; the handler that the program installs is taken away again."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("robustvlm.runs.manifest.git_commit", lambda: None)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the program in this process."""
    from command_line import Ended

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["robustvlm", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an encoder, pictures of two classes, and files with mistakes of many kinds."""
    monkeypatch.delitem(sys.modules, "own_encoders", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    from command_line import MEAN

    (tmp_path / "own_encoders.py").write_text(MEAN + OTHERS)
    for name, colour in (("red", (200, 40, 30)), ("blue", (30, 60, 180))):
        for root, count in (("photos", 4), ("corrupt", 0), ("no_images", 0)):
            (tmp_path / root / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (colour[0] - 9 * number, *colour[1:])).save(
                    tmp_path / root / name / f"{number}.png"
                )
        (tmp_path / "corrupt" / name / "0.png").write_bytes(b"no image")
    (tmp_path / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "red" / "0.png")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"number": [1, 2]}), tmp_path / "numbers.parquet")
    texts = {
        "cycle.csv": "parent,child\nred,blue\nblue,red\n",
        "names1.txt": "red\n",
        "prompts.txt": "a photo\n",
        "file": "x",
        "broken.parquet": "PAR1",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path

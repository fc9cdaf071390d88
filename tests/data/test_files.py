"""Images given by paths: which are found, in which order, under which names, and with the pixels that data has."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustvlm.data import open_data
from robustvlm.data.files import FileImages, path_text
from robustvlm.data.source import Sample, Unreadable
from robustvlm.errors import UserError


def picture(path: Path, size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 40)).save(path, format="PNG")
    return path


def ids(*paths: str | Path, **options: io.BytesIO) -> list[str]:
    return [item.id for item in FileImages(paths, **options).samples()]  # type: ignore[arg-type]


def test_folders_are_walked_in_natural_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a10.png", "a2.png", "b/c/d.jpg", "b/no_suffix", ".hidden/x.png", "__MACOSX/y.png"):
        picture(Path("photos", name))
    Path("photos/readme.txt").write_text("no image")
    Path("photos/loop").symlink_to("../photos")
    source = FileImages(["photos"])
    assert [item.id for item in source.samples()] == [
        "photos/a2.png", "photos/a10.png", "photos/b/c/d.jpg", "photos/b/no_suffix",
    ]  # fmt: skip
    assert source.aside == 1
    assert ids("photos/a2.png", "photos/b") == ["photos/a2.png", "photos/b/c/d.jpg", "photos/b/no_suffix"]


def test_a_pattern_that_the_shell_left_alone_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x/a10.png", "x/a2.png", "x/y/b.png", "[1].png"):
        picture(Path(name))
    assert ids("x/*.png") == ["x/a2.png", "x/a10.png"]
    assert ids("**/b.png") == ["x/y/b.png"]
    assert ids("[1].png") == ["[1].png"]  # a file of that very name
    with pytest.raises(UserError, match=r"'z\*' matches no file"):
        FileImages(["z*"])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_list_is_read_from_a_stream(end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a b.png", "folder", "*.png", "~.png"]
    for name in ("a b.png", "folder/c.png", "*.png", "~.png"):
        picture(Path(name))
    listed = io.BytesIO(end.join(map(os.fsencode, names)))
    assert ids("~.png", "-", lists=listed) == ["~.png", "a b.png", "folder/c.png", "*.png", "~.png"]
    if end == b"\0":
        picture(Path("two\nlines.png"))
        assert ids("-", lists=io.BytesIO(b"two\nlines.png\0")) == ["two\nlines.png"]
    with pytest.raises(UserError, match="given twice"):
        FileImages(["-", "-"])


def test_a_list_is_read_as_it_comes() -> None:
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert size >= 0
            return b"missing.png\nmiss"[: size or 1] + b"ing.png\n" * 9

    stream = FileImages(["-"], lists=Endless()).samples()  # type: ignore[arg-type]
    assert [next(stream).id for _ in range(50)][:2] == ["missing.png", "missing.png"]


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    Path("text.png").write_text("no image")
    found = list(FileImages(["empty.png", "text.png", "gone.png", "a\0b"]).samples())
    assert [item.reason for item in found if isinstance(item, Unreadable)] == [
        "empty file", "not an image of a known format", "no such file or directory", "no path: it holds a zero byte",
    ]  # fmt: skip
    for spec in ("emoji", "emoji?split=near", "imagefolder:photos"):
        with pytest.raises(UserError, match=f"pass data={spec.replace('?', '[?]')}"):
            FileImages([spec])


def test_names_that_are_no_text_still_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for raw in (b"\xff\xfe.png", b"=1+2.png", b"-n.png", b"\x1b[2J.png"):
        picture(Path("in", os.fsdecode(raw)))
    found = list(FileImages([os.fsdecode(b"in/\xff\xfe.png"), "in"]).samples())
    assert all(isinstance(item, Sample) for item in found)
    for item in found:
        item.id.encode("utf-8")
    assert found[0].id == "in/\\udcff\\udcfe.png"
    monkeypatch.chdir("in")
    assert ids("=1+2.png", "-n.png") == ["./=1+2.png", "./-n.png"]
    assert Path(path_text("=1+2.png")).exists()


def special(folder: Path) -> None:
    """Images that a careless reader gets wrong: turned by EXIF, 16 bits deep, with a palette, transparent, grey."""
    folder.mkdir(parents=True)
    ramp = np.arange(48, dtype=np.uint8).reshape(4, 12) * 5
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp // 2], -1)).save(folder / "turned.jpg", exif=exif, quality=95)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.stack([ramp] * 3, -1)).quantize(7).save(folder / "palette.png", transparency=2)
    Image.fromarray(np.stack([ramp, ramp, ramp, ramp[:, ::-1]], -1)).save(folder / "alpha.png")
    Image.fromarray(ramp).convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(ramp).save(folder / "grey.gif")


def test_pixels_are_those_of_the_data_layer(tmp_path: Path) -> None:
    special(tmp_path / "photos" / "cat")
    Image.new("RGB", (3, 3)).save(tmp_path / "photos" / "cat" / "z.png")
    picture(tmp_path / "photos" / "dog" / "1.png")
    seen = [item for item in open_data(f"imagefolder:{tmp_path}/photos").samples() if isinstance(item, Sample)]
    given = [item for item in FileImages([tmp_path / "photos"]).samples() if isinstance(item, Sample)]
    by_name = {Path(item.id).name: item.image for item in seen}
    assert len(given) == len(seen) == 8
    for item in given:
        assert item.image.tobytes() == by_name[Path(item.id).name].tobytes()
        assert item.image.size == by_name[Path(item.id).name].size
    assert by_name["turned.jpg"].size == (4, 12)

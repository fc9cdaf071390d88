"""Every kind of image becomes RGB, 8 bit; every kind of damage becomes a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustvlm.data.decode import DecodeError, decode, to_rgb
from robustvlm.data.source import Sample, Unreadable

Plain = Callable[..., bytes]


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    item = decode("x", data, 0)
    assert isinstance(item, Sample), item
    assert item.image.mode == "RGB"
    value = item.image.getpixel(at)
    assert isinstance(value, tuple)
    return value


def reason(data: bytes | Path) -> str:
    item = decode("x", data, 0)
    assert isinstance(item, Unreadable), item
    assert "\n" not in item.reason
    return item.reason


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (200, 30, 60), (200, 30, 60)),
        ("RGBA", (200, 30, 60, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 300, (1, 1, 1)),
    ],
)
def test_png_modes(plain: Plain, mode: str, colour: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert pixel(plain(colour, mode=mode)) == expected


def test_transparent_palette_is_laid_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert pixel(saved(image, "PNG")) == (40, 50, 60)
    assert pixel(saved(image, "PNG", transparency=1)) == (255, 255, 255)
    assert pixel(saved(image, "GIF", transparency=1)) == (255, 255, 255)


def test_cmyk_jpeg() -> None:
    white = pixel(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    black = pixel(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert min(white) > 250
    assert max(black) < 5


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG"):
        red, green, _ = pixel(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert red > 240
        assert green < 15


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    item = decode("x", saved(image, "PNG", exif=exif), 0)
    assert isinstance(item, Sample)
    assert item.image.size == (8, 16)
    assert item.image.getpixel((4, 2)) == (255, 255, 255)
    assert item.image.getpixel((4, 13)) == (0, 0, 0)


def test_damaged_exif_does_not_cost_the_image() -> None:
    assert pixel(saved(Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")) == (9, 9, 9)


def test_damage_is_a_reason(noise: bytes) -> None:
    assert reason(b"") == "empty file"
    assert "not an image" in reason(b"GET / HTTP/1.1")
    assert "not an image" in reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert "damaged" in reason(noise[: len(noise) // 2])
    jpeg = saved(Image.open(io.BytesIO(noise)), "JPEG")
    assert "truncated" in reason(jpeg[: len(jpeg) // 2])
    assert "no defined white" in reason(saved(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_a_decompression_bomb_is_refused() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    assert "decompression bomb" in reason(bomb)


def test_files(tmp_path: Path, plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(plain())
    assert isinstance(decode("x", file, 0), Sample)
    assert reason(tmp_path / "none.png") == "no such file or directory"
    assert reason(tmp_path) == "not a regular file"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not a regular file"
    (tmp_path / "empty.png").touch()
    assert reason(tmp_path / "empty.png") == "empty file"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert reason(file) == "permission denied"


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
def test_no_bytes_raise(patch: bytes, at: int, kind: str) -> None:
    values = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    data = bytearray(saved(Image.fromarray(values), kind))
    data[at : at + len(patch)] = patch
    item = decode("x", bytes(data), 1)
    assert isinstance(item, Unreadable) or item.image.mode == "RGB"


def tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """Return an uncompressed grey TIFF of 2 x 2 pixels, written by hand: Pillow writes no such ones."""
    tags = [
        (256, 2),
        (257, 2),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 2),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "data", "grey"),
    [
        (16, 1, b"\xff" * 8, 255),
        (16, 0, b"\xff" * 8, 0),  # stored with white as zero
        (16, 0, bytes(8), 255),
        (12, 1, b"\xff" * 6, 255),  # 4095 is white
        (12, 1, b"\x80\x08" * 3, 128),
        (8, 0, b"\xff" * 4, 0),
    ],
)
def test_grey_tiffs_of_every_depth(bits: int, photometric: int, data: bytes, grey: int) -> None:
    assert pixel(tiff(bits, photometric, data)) == (grey,) * 3


def png(colour: int, bits: int, row: bytes, *chunks: tuple[bytes, bytes], width: int = 2) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 2, bits, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + row) * 2)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


def test_png_of_sixteen_bits_and_with_a_transparent_colour() -> None:
    rgb, grey = struct.pack(">3H", 257 * 200, 257 * 30, 257 * 60), struct.pack(">H", 257 * 200)
    assert pixel(png(2, 16, rgb * 2)) == (200, 30, 60)
    assert pixel(png(6, 16, (rgb + bytes(2)) * 2)) == (255, 255, 255)
    assert pixel(png(0, 16, grey * 2)) == (200, 200, 200)
    assert pixel(png(0, 16, grey * 2, (b"tRNS", grey))) == (255, 255, 255)
    assert pixel(png(2, 16, rgb * 2, (b"tRNS", rgb))) == (255, 255, 255)
    assert pixel(png(0, 8, bytes([200] * 2), (b"gAMA", struct.pack(">I", 100_000)))) == (200, 200, 200)


def test_what_has_no_plain_colours_is_a_reason() -> None:
    assert "LAB" in reason(saved(Image.new("LAB", (4, 4), (50, 128, 128)), "TIFF"))
    assert "no defined white" in reason(saved(Image.new("I", (4, 4), 70_000), "TIFF"))
    assert "HEIC" in reason(b"\0\0\0\x18ftypheic" + bytes(99)) or "damaged" in reason(b"\0\0\0\x18ftypheic" + bytes(99))
    with pytest.raises(DecodeError, match="without pixels"):
        to_rgb(Image.new("RGB", (0, 4)))
    red = pixel(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 250
    assert max(red[1:]) < 5
    # Pillow before 13 cannot read the YCbCr TIFF that it writes, and says so.
    item = decode("x", saved(Image.new("YCbCr", (16, 16), (76, 85, 255)), "TIFF"), 0)
    assert isinstance(item, Unreadable) or item.image.getpixel((0, 0))[0] > 250

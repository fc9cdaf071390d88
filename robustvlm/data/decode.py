"""From image files of any common kind to RGB, 8 bit; what cannot be decoded becomes a reason, not an exception."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from robustvlm.data.source import Sample, Unreadable

# Only raster formats decoded inside Pillow: its EPS reader, for one, hands the file to an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF", "MPO")
_ALPHA_MODES = {"RGBA", "LA", "PA", "La", "RGBa"}
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}


class DecodeError(Exception):
    """Why an image cannot be used, in words fit for a report."""


def decode(name: str, data: bytes | bytearray | memoryview | Path, label: int) -> Sample | Unreadable:
    """Return the sample in `data` (encoded bytes or a file), or why it cannot be decoded; never raises for bad data.

    Example:
        >>> decode("a", b"", 0)
        Unreadable(id='a', reason='empty file')
    """
    try:
        return Sample(name, _open_file(data) if isinstance(data, Path) else _open_bytes(data), label)
    except DecodeError as error:
        return Unreadable(name, str(error))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, 8 bit: transparency over white, 16-bit grey scaled by 257, EXIF orientation applied.

    Of an animation the frame it stands at is taken.

    Raises:
        DecodeError: a mode without a defined white (32-bit integers or floats).

    Example:
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        image = _eight_bit(image)
    if image.mode in {"I", "F"}:
        raise DecodeError(f"pixels of mode {image.mode} have no defined white: store the image with 8 or 16 bits")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    # A copy drops the file behind the image and its metadata (ICC profile, EXIF) along with it.
    return Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())


def _open_file(path: Path) -> Image.Image:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise DecodeError("not a regular file")
        if info.st_size == 0:
            raise DecodeError("empty file")
        with path.open("rb") as file:
            return _decoded(file)
    except OSError as error:
        raise DecodeError((error.strerror or str(error)).lower()) from None


def _open_bytes(data: bytes | bytearray | memoryview) -> Image.Image:
    if not len(data):
        raise DecodeError("empty file")
    return _decoded(io.BytesIO(data))


def _decoded(file: IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of much that is harmless (odd EXIF, palette transparency); a bomb is the one that counts.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=_known_formats()) as image:
                return _converted(image)
        except UnidentifiedImageError:
            raise DecodeError("not an image of a known format") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise DecodeError(f"more than {Image.MAX_IMAGE_PIXELS} pixels: refused as a decompression bomb") from None
        except DecodeError:
            raise
        except Exception as error:  # the header parsers raise nearly anything on hostile bytes
            raise DecodeError(f"damaged image: {one_line(error)}") from None


def _converted(image: Image.Image) -> Image.Image:
    try:
        image.load()
        return to_rgb(image)
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError(f"too large to decode: {image.width} x {image.height} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DecodeError(f"damaged image: {one_line(error)}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels, which are kept as stored
        return image
    turned.format = image.format
    return turned


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey, 65535 becoming 255 (Pillow's own conversion clips at 255)."""
    import numpy as np

    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def one_line(error: object) -> str:
    """Return the text of an error on one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."

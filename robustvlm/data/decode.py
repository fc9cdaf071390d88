"""From image files of any kind to RGB, 8 bit, ahead of the model; a bad file becomes a reason, not an exception."""

from __future__ import annotations

import io
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO, Generic, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from robustvlm.data.source import Sample, Unreadable
from robustvlm.text import one_line

# From image files of any common kind to RGB, 8 bit; what cannot be decoded becomes a reason, not an exception

# Only raster formats decoded inside Pillow: its EPS reader, for one, hands the file to an interpreter.
_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "ICO", "AVIF", "MPO", "HEIF", "JXL",
)  # fmt: skip
# Image files by their names, whether this Pillow reads them or not: one that it cannot read is counted as unreadable.
_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
        ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".ico", ".avif", ".heic", ".heif",
        ".hif", ".jxl", ".psd", ".svg", ".exr", ".cr2", ".cr3", ".nef", ".arw", ".dng",
    }
)  # fmt: skip
# What image files begin with, of those kinds that can be told by it for certain.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0...\0[\x0c\x28\x6c\x7c]\0\0\0|II\*\0|MM\0\*|"
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51|\0\0\0\x0cJXL |....ftyp(avif|avis|hei[cxms]|hev[cxms]|mif1|msf1)|P[1-6]\s\d",
    re.DOTALL,
)
_HEIC = re.compile(rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)
_PLUGINS = (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None))
_ALPHA_MODES = {"RGBA", "LA", "PA", "La", "RGBa"}
_SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}


class DecodeError(Exception):
    """Why an image cannot be used, in words fit for a report."""


def decode(
    name: str,
    data: bytes | bytearray | memoryview | Path,
    label: int,
    *,
    captions: tuple[str, ...] = (),
    subgroup: str = "",
) -> Sample | Unreadable:
    """Return the sample in `data` (encoded bytes or a file), or why it cannot be decoded; never raises for bad data.

    Example:
        >>> decode("a", b"", 0)
        Unreadable(id='a', reason='empty file')
    """
    try:
        image = _open_file(data) if isinstance(data, Path) else _open_bytes(data)
        return Sample(name, image, label, captions, subgroup)
    except DecodeError as error:
        return Unreadable(name, str(error))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, 8 bit: transparency over white, 16-bit grey scaled by 257, EXIF orientation applied.

    Of an animation the frame it stands at is taken; colour profiles and gamma are ignored, as CLIP's own
    preprocessing does.

    Raises:
        DecodeError: no pixels, or a mode without a defined white or meaning (32-bit integers, floats, L*a*b*).

    Example:
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if min(image.size) < 1:
        raise DecodeError("an image without pixels")
    image = _upright(image)
    if image.mode in _SIXTEEN_BIT or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        image = _eight_bit(image)
    if image.mode in {"I", "F"}:
        raise DecodeError(f"pixels of mode {image.mode} have no defined white: store the image with 8 or 16 bits")
    if image.mode in {"LAB", "HSV"}:
        raise DecodeError(f"colours of mode {image.mode} are not read: store the image as RGB")
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
            file.seek(0)
            if _HEIC.match(file.read(32)):
                raise DecodeError(
                    "a HEIC image, which needs the package pillow-heif: pip install pillow-heif"
                ) from None
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


def image_suffixes() -> frozenset[str]:
    """Return the endings, lower case, by which files count as images."""
    return _SUFFIXES | _registered_suffixes()


def looks_like_image(path: Path) -> bool:
    """Whether a file begins as image files do, whatever it is called.

    Example:
        >>> looks_like_image(Path(__file__))
        False
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return _MAGIC.match(file.read(32)) is not None
    except OSError:
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels, which are kept as stored
        return image
    turned.format = image.format
    if not hasattr(turned, "tag_v2") and hasattr(image, "tag_v2"):
        turned.tag_v2 = image.tag_v2  # type: ignore[attr-defined]
    return turned


def _eight_bit(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as 8-bit grey, 65535 becoming 255 (Pillow's own conversion clips at 255)."""
    import numpy as np

    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    white = 2**bits - 1 if 8 < bits < 16 else 65535
    grey = ((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(262) == 0:  # stored with white as zero, which Pillow leaves as it is at more than 8 bits
        grey = 255 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, 255, grey).astype(np.uint8)
    return Image.fromarray(grey)


@cache
def _known_formats() -> tuple[str, ...]:
    for module, register in _PLUGINS:
        try:
            plugin = import_module(module)
        except ImportError:
            continue
        if register is not None:
            getattr(plugin, register)()
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def _registered_suffixes() -> frozenset[str]:
    known = _known_formats()
    return frozenset(end.lower() for end, name in Image.registered_extensions().items() if name in known)


# Reading and decoding ahead in a background thread, so that the model does not wait for the disk

T = TypeVar("T")

_FAREWELL_SECONDS = 1.0


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield `items` in their order, made by a background thread that runs at most `depth` of them ahead.

    An exception of the thread is raised here, after the items that came before it. The thread ends, and closes
    `items`, when this iterator is used up or closed.

    Example:
        >>> list(prefetch((n * n for n in range(4)), depth=2))
        [0, 1, 4, 9]
    """
    shelf = _Shelf[T](max(1, depth))
    thread = threading.Thread(target=_fill, args=(items, shelf), name="robustvlm-prefetch", daemon=True)
    thread.start()
    try:
        yield from shelf.taken()
    finally:
        shelf.close()
        # One that hangs in a network read is left behind: it finds the shelf closed when it comes back.
        thread.join(timeout=_FAREWELL_SECONDS)


def _fill(items: Iterable[T], shelf: _Shelf[T]) -> None:
    iterator = iter(items)
    try:
        for item in iterator:
            if not shelf.put(item):
                break
        shelf.end(None)
    except BaseException as error:
        shelf.end(error)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


class _Shelf(Generic[T]):
    """A bounded queue with an end on either side; no one polls."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Wait for room and add an item; False when nobody will take it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None) -> None:
        """Say that no more items come, and why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no more items will be taken."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def taken(self) -> Iterator[T]:
        """Yield the items until the end, then raise what ended them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    break
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error

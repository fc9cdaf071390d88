"""Images as they lie on a disk: files, folders, patterns and lists of paths, without classes."""

import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from robustvlm.data.decode import decode, image_suffixes, looks_like_image
from robustvlm.data.labels import natural_key
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.specs import KINDS
from robustvlm.data.splits import is_junk
from robustvlm.errors import UserError, setting

STDIN = "-"
"""Stands for a list of paths on standard input, a line each, or each ended by a zero byte (`find -print0`)."""

# A name that begins so is a formula to a spreadsheet or an option to a shell; with "./" before it is the same file.
_MISREAD = tuple("=+-@\t\r\n'\uff1d\uff0b\uff0d\uff20")
_BYTES = 2**16


class FileImages(DataSource):
    """Images given by their paths, of unknown class; ids are the paths as they were given, as text.

    A file that is named is tried whatever it is called, and recorded as unreadable if it is no image or not there.
    Folders are walked to the bottom in natural order; in them, what systems leave behind and files that are no images
    are counted in `aside`. Links are followed, a folder within itself once. Patterns (`*`, `?`, `[...]`, `**`) are
    expanded where no file bears that very name. Names that are no valid text are written with backslash escapes.

    Args:
        paths: files, folders, patterns, or "-" for a list on standard input, read as it comes.
        lists: where such a list is read from, in place of standard input.

    Raises:
        UserError: a pattern that matches nothing, a data spec in place of a path, or "-" twice.

    Example:
        >>> source = FileImages(["no such file.png"])
        >>> next(source.samples())
        Unreadable(id='no such file.png', reason='no such file or directory')
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, lists: BinaryIO | None = None) -> None:
        super().__init__("files", ())
        self.aside = 0
        self._lists = lists
        texts = [os.fspath(path) for path in paths]
        if texts.count(STDIN) > 1:
            raise UserError("'-' is given twice, and standard input is read once: give it once")
        self._paths = [found for text in texts for found in _expanded(text)]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for name in self._paths:
            for path in self._listed() if name == STDIN else (name,):
                yield from self._below(path, keep)

    def _listed(self) -> Iterator[str]:
        yield from _entries(self._lists or sys.stdin.buffer)

    def _below(self, name: str, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        """Yield the image at a path, or all those in the folder there."""
        if "\0" in name:
            if keep(path_text(name)):
                yield Unreadable(path_text(name), "no path: it holds a zero byte")
        elif os.path.isdir(name):
            yield from self._walk(name, (), keep)
        elif keep(path_text(name)):
            yield decode(path_text(name), Path(name), UNKNOWN)

    def _walk(self, folder: str, above: tuple[str, ...], keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        real = os.path.realpath(folder)
        if real in above:
            return
        try:
            names = sorted(os.listdir(folder), key=natural_key)
        except OSError as error:
            if keep(path_text(folder)):
                yield Unreadable(path_text(folder), (error.strerror or str(error)).lower())
            return
        for name in names:
            path = os.path.join(folder, name)
            if is_junk(name):
                continue
            if os.path.isdir(path):
                yield from self._walk(path, (*above, real), keep)
            elif os.path.splitext(name)[1].lower() not in image_suffixes() and not looks_like_image(Path(path)):
                self.aside += 1
            elif keep(path_text(path)):
                yield decode(path_text(path), Path(path), UNKNOWN)


def path_text(path: str) -> str:
    r"""Return a path as valid text that names the same file to who reads it, and is no formula to a spreadsheet.

    Bytes that are no text become backslash escapes, as in the ids of other data.

    Example:
        >>> path_text("=1+2.png"), path_text("a\udcff.png")
        ('./=1+2.png', 'a\\udcff.png')
    """
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    return f"./{text}" if text.startswith(_MISREAD) else text


def _expanded(text: str) -> list[str]:
    """Return what a path, or a pattern that the shell has left alone, stands for."""
    path = os.path.expanduser(text)
    if text == STDIN or os.path.lexists(path):
        return [path]
    if glob.has_magic(path) and "\0" not in path:
        found = sorted(glob.glob(path, recursive=True), key=natural_key)
        if found:
            return found
    if text.partition(":")[0].partition("?")[0] in KINDS:
        raise UserError(f"'{text}' is no file but looks like a data spec: pass {setting('data', text)}")
    if glob.has_magic(path):
        raise UserError(f"the pattern '{text}' matches no file: expected a file, a folder or a pattern that does")
    return [path]


def _entries(stream: BinaryIO) -> Iterator[str]:
    """Yield the paths of a list; it is read in pieces, and the first tells what ends a path."""
    read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
    end, rest = b"", b""
    while piece := read(_BYTES):
        end = end or (b"\0" if b"\0" in piece else b"\n")
        *whole, rest = (rest + piece).split(end)
        yield from _named(whole, end)
    yield from _named([rest], end)


def _named(entries: Sequence[bytes], end: bytes) -> Iterator[str]:
    for entry in entries:
        name = entry.removesuffix(b"\r") if end == b"\n" else entry
        if name:
            yield os.fsdecode(name)

"""Images in folders, one a class: `imagefolder:DIR`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from robustvlm.data.decode import decode
from robustvlm.data.names import readable
from robustvlm.data.source import DataSource, Sample, Unreadable
from robustvlm.data.specs import Spec
from robustvlm.errors import UserError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".tga", ".avif"}
)
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "dev"})


@dataclass(frozen=True)
class _File:
    id: str
    path: Path
    label: int
    fault: str | None = None


class ImageFolder(DataSource):
    """Images under `root/CLASS/`, at any depth; ids are paths relative to the root, labels follow the sorted folders.

    WordNet ids as folder names (n01440764) become ImageNet's class names; other names are read with "_" as a space.
    A link that leads out of the root is a recorded fault unless `links` is true.

    Raises:
        UserError: no such folder, no class folder in it, no image, or folders that are splits and not classes.
    """

    def __init__(self, root: Path, *, links: bool = False, spec: str | None = None) -> None:
        self.root = root
        self._links = links
        folders = _class_folders(root)
        super().__init__(spec or f"imagefolder:{root}", _display_names([folder.name for folder in folders]))
        self._files = [
            file
            for label, folder in enumerate(folders)
            for file in self._walk(folder, label, (os.path.realpath(root),))
        ]
        if not self._files:
            raise UserError(f"{root} has {len(folders)} class folders but no image in them ({_shown_suffixes()})")

    @classmethod
    def from_spec(cls, spec: Spec) -> ImageFolder:
        """Open `imagefolder:DIR[?links=1]`."""
        spec.check_options("links")
        return cls(spec.path("folder"), links=spec.flag("links"), spec=spec.text)

    def ids(self) -> list[str]:
        """Return the paths relative to the root, sorted within each class."""
        return [file.id for file in self._files]

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        for file in self._files:
            if keep(file.id):
                yield Unreadable(file.id, file.fault) if file.fault else decode(file.id, file.path, file.label)

    def _identity(self) -> Iterable[str]:
        for file in self._files:
            try:
                size = file.path.stat().st_size
            except OSError:
                size = -1
            yield f"{file.id} {file.label} {size}"

    def _walk(self, folder: Path, label: int, above: tuple[str, ...]) -> Iterator[_File]:
        """Yield the images below a folder, sorted; `above` are the real folders it lies in, against loops of links."""
        real = os.path.realpath(folder)
        if real in above:
            return
        fault = self._fault(folder)
        try:
            entries = [] if fault else sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            entries, fault = [], (error.strerror or str(error)).lower()
        if fault:
            yield _File(self._id(folder), folder, label, fault)
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path):  # unlike the entry's own test, false for links that lead round in a circle
                yield from self._walk(path, label, (*above, real))
            elif path.suffix.lower() in SUFFIXES:
                yield _File(self._id(path), path, label, self._fault(path))

    def _fault(self, path: Path) -> str | None:
        if self._links or not path.is_symlink():
            return None
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))
        return None if inside else "a link that leads out of the folder: add ?links=1 to follow such links"

    def _id(self, path: Path) -> str:
        # File names need not be valid text; ids are written to files that must be.
        return path.relative_to(self.root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def _class_folders(root: Path) -> list[Path]:
    if not root.exists():
        raise UserError(f"no folder {root}")
    if not root.is_dir():
        raise UserError(f"{root} is a file: imagefolder expects a folder with one subfolder a class")
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror or error}") from None
    folders = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    if not folders:
        images = sum(path.suffix.lower() in SUFFIXES for path in entries)
        held = f"{images} images but no class subfolders" if images else "nothing to read" if entries else "nothing"
        raise UserError(f"{root} holds {held}: imagefolder expects DIR/CLASS/IMAGE, one subfolder a class")
    if {folder.name.lower() for folder in folders} <= _SPLITS:
        raise UserError(f"the subfolders of {root} look like splits, not classes: pass imagefolder:{folders[-1]}")
    return folders


def _display_names(folders: list[str]) -> tuple[str, ...]:
    if all(name[:1] == "n" and len(name) == 9 and name[1:].isdigit() for name in folders):
        from robustvlm.data.classes import wordnet_names

        known = wordnet_names()
        return tuple(known.get(name, name) for name in folders)
    return readable([name.encode("utf-8", "backslashreplace").decode("utf-8") for name in folders])


def _shown_suffixes() -> str:
    return " ".join(sorted(SUFFIXES))

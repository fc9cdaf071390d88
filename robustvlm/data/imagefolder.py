"""Images in folders, one a class: `imagefolder:DIR`."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from robustvlm.core.files import beginning
from robustvlm.data.decode import decode, image_suffixes, looks_like_image
from robustvlm.data.labels import natural_key
from robustvlm.data.names import readable
from robustvlm.data.source import SAMPLED, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import Spec
from robustvlm.data.splits import chosen_split, is_junk, said_of, split_kind
from robustvlm.errors import UserError


@dataclass(frozen=True)
class _File:
    id: str
    path: Path
    label: int
    fault: str | None = None


class ImageFolder(DataSource):
    """Images under `root/CLASS/`, at any depth; ids are paths relative to the root.

    Labels follow the folders in natural order ("class_2" before "class_10"). WordNet ids as folder names (n01440764)
    become ImageNet's class names; other names are read with "_" as a space. Folders that hold no image and what
    systems leave behind (`__MACOSX`, `@eaDir`, ...) are no classes; they, and files that are no images, are named in
    `remarks`. With `empty`, folders without images are classes too. A link that leads out of the root is a recorded
    fault unless `links` is true.

    Raises:
        UserError: no such folder, no class folder in it, no image, or several splits in one place and none chosen.
    """

    def __init__(
        self, root: Path, *, links: bool = False, empty: bool = False, split: str | None = None, spec: str | None = None
    ) -> None:
        _check_folder(root)
        root, within = chosen_split(root, split)
        self.root, self._within = root, within
        self._links = links
        self._aside: Counter[str] = Counter()
        above = (os.path.realpath(root),)
        walked = [(folder, list(self._walk(folder, 0, above))) for folder in _class_folders(root, self._aside)]
        filled = [folder for folder, files in walked if files]
        # One class says nothing: beside a single folder with images, the empty ones can only be the other classes.
        empty = empty or (len(filled) == 1 and split_kind(filled[0].name) is None)
        classes: list[Path] = []
        self._files: list[_File] = []
        for folder, files in walked:
            if files or empty:
                self._files += [dataclasses.replace(file, label=len(classes)) for file in files]
                classes.append(folder)
            else:
                self._aside[f"{_text(folder.name)} (no image in it)"] += 1
        marks = tuple(_text(folder.name) for folder in classes)
        super().__init__(spec or f"imagefolder:{root}", _display_names(marks))
        self.marks = marks
        if not self._files:
            raise UserError(
                f"{root} has no image in a class folder: imagefolder expects DIR/CLASS/IMAGE, "
                f"found {said_of(self._aside)}"
            )
        if split is None and len(classes) == 1 and split_kind(classes[0].name):
            raise UserError(
                f"the only folder with images in {root}, '{marks[0]}', looks like a split, not like a class: "
                f"pass imagefolder:{classes[0]} or ?split={marks[0]}"
            )
        if within is None and all(file.id.count("/") > 1 for file in self._files):
            first = self._files[0].id.split("/")
            self.remarks.append(
                f"the images lie in folders below the class folders, as '{first[1]}' in '{first[0]}', and those are no "
                f"classes: if they should be, pass the folder above them"
            )
        elif within is None:
            self.remarks += self._split_among_classes()
        if len(filled) == 1 < len(classes):
            self.remarks.append(f"only '{_text(filled[0].name)}' holds images: the empty folders count as classes")
        if self._aside:
            self.remarks.append(f"left aside: {said_of(self._aside)}")

    @classmethod
    def from_spec(cls, spec: Spec) -> ImageFolder:
        """Open `imagefolder:DIR[?links=1&empty=1&split=NAME]`."""
        spec.check_options("links", "empty", "split")
        links, empty, split = spec.flag("links"), spec.flag("empty"), spec.options.get("split")
        return cls(spec.path("folder"), links=links, empty=empty, split=split, spec=spec.text)

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

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        path_of = {file.id: file.path for file in self._files if file.fault is None}
        for name in select(path_of, SAMPLED):
            yield name, beginning(path_of[name])

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
        if len(above) == 1 and self._within is not None:
            entries = [entry for entry in entries if entry.name == self._within]
        elif len(above) == 1:
            _check_one_split(folder, [e.name for e in entries if split_kind(e.name) and os.path.isdir(e.path)])
        for entry in entries:
            path = Path(entry.path)
            if is_junk(entry.name):
                self._aside[_text(entry.name)] += 1
            elif os.path.isdir(path):  # unlike the entry's own test, false for links that lead round in a circle
                yield from self._walk(path, label, (*above, real))
            elif path.suffix.lower() in image_suffixes():
                yield _File(self._id(path), path, label, self._fault(path))
            elif (fault := self._fault(path)) is None and looks_like_image(path):
                yield _File(self._id(path), path, label)
            else:
                self._aside[path.suffix.lower() or _text(entry.name)] += 1

    def _split_among_classes(self) -> list[str]:
        """Say of a class that bears the name of a split, and holds folders, that it may be one."""
        below: dict[int, set[str]] = {}
        for file in self._files:
            below.setdefault(file.label, set()).add(file.id.partition("/")[2].rpartition("/")[0])
        found = []
        for label, mark in enumerate(self.marks):
            folders = sorted(below.get(label, ()))
            if split_kind(mark) and folders and all(folders):
                shown = ", ".join(f"'{name}'" for name in folders[:3])
                found.append(
                    f"'{mark}' is taken for a class, and its folders ({shown}) are none: if it is a split, "
                    f"pass ?split={mark}"
                )
        return found

    def _fault(self, path: Path) -> str | None:
        if self._links or not path.is_symlink():
            return None
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))
        return None if inside else "a link that leads out of the folder: add ?links=1 to follow such links"

    def _id(self, path: Path) -> str:
        # File names need not be valid text; ids are written to files that must be.
        return _text(path.relative_to(self.root).as_posix())


def _text(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise UserError(f"no folder {root}")
    if not root.is_dir():
        raise UserError(f"{root} is a file: imagefolder expects a folder with one subfolder a class")


def _class_folders(root: Path, aside: Counter[str]) -> list[Path]:
    """Return the folders that may be classes, in natural order; what else lies there is counted in `aside`."""
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror or error}") from None
    folders = []
    for path in entries:
        if path.is_dir() and not is_junk(path.name):
            folders.append(path)
        elif path.suffix.lower() in image_suffixes() and not is_junk(path.name):
            aside["images beside the class folders"] += 1
        else:
            aside[_text(path.name)] += 1
    if not folders:
        images = aside["images beside the class folders"]
        held = f"{images} images but no class subfolders" if images else "nothing to read" if entries else "nothing"
        raise UserError(f"{root} holds {held}: imagefolder expects DIR/CLASS/IMAGE, one subfolder a class")
    return sorted(folders, key=lambda path: natural_key(path.name))


def _check_one_split(folder: Path, names: list[str]) -> None:
    """Refuse a class folder with training and test images, which one number must not mix."""
    found = {kind: name for name in names if (kind := split_kind(name)) is not None}
    if len(found) > 1:
        shown = ", ".join(f"'{name}'" for name in found.values())
        raise UserError(
            f"the class folder {folder} holds the splits {shown}: choose one with ?split={next(iter(found.values()))}"
        )


def _display_names(folders: Sequence[str]) -> tuple[str, ...]:
    if folders and all(name[:1] == "n" and len(name) == 9 and name[1:].isdigit() for name in folders):
        from robustvlm.data.classes import wordnet_names

        known = wordnet_names()
        return tuple(known.get(name, name) for name in folders)
    return readable(folders)

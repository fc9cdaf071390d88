"""WebDataset shards: `wds:PATH` or `wds:URL`, tar files whose members share a key."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Any

from robustvlm.core.network import Deadline, SteadyStream, open_url
from robustvlm.data.classes import DEFAULT, check_templates, read_class_names, usual_names
from robustvlm.data.decode import decode
from robustvlm.data.labels import Own, captions_of, label_of, settle_names
from robustvlm.data.names import read_lines
from robustvlm.data.source import SAMPLED, UNKNOWN, DataSource, Sample, Unreadable, select
from robustvlm.data.specs import Spec
from robustvlm.data.splits import chosen_split, is_junk, one_split, split_kind
from robustvlm.errors import MissingExtra, UserError
from robustvlm.text import HIDDEN, one_line, without_secrets

# Where WebDataset shards lie: local tar files, folders of them, and http(s) addresses

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_TIMEOUT = 60
"""Seconds to the first byte, and for every read after it, however slowly its bytes come in."""


@dataclass(frozen=True)
class Shard:
    """One tar file, local or at an http(s) address; `name` is unique among the shards of a source."""

    name: str
    address: str

    @property
    def path(self) -> Path | None:
        """The local file, or None for an address on the net."""
        return None if "://" in self.address else Path(self.address)

    @property
    def size(self) -> int:
        """Bytes of a local file, -1 on the net."""
        return self.path.stat().st_size if self.path else -1

    def open(self) -> IO[bytes]:
        """Open the shard for reading from start to end."""
        if self.path:
            return self.path.open("rb")
        deadline = Deadline(_TIMEOUT)
        return io.BufferedReader(SteadyStream(open_url(self.address, deadline), deadline, wait=_TIMEOUT), 2**16)


def find_shards(spec: Spec) -> list[Shard]:
    """Return the shards a spec names; `{000..007}` is expanded, a folder gives its tar files, sorted.

    Only files and http(s) addresses are read: other schemes of WebDataset run programs.

    Raises:
        UserError: another scheme, no such file, or a folder without tar files.
    """
    if not spec.rest:
        raise UserError("'wds' names no shard: write wds:PATH or wds:URL, for example wds:data/test-{000..007}.tar")
    split = spec.options.get("split")
    addresses = [address for pattern in _expand(spec.rest) for address in _resolve(pattern, split)]
    stems = [_stem(address) for address in addresses]
    twice = Counter(stems)
    names = [stem if twice[stem] == 1 else f"{i:05d}-{stem}" for i, stem in enumerate(stems)]
    return [Shard(name, address) for name, address in zip(names, addresses, strict=True)]


def _expand(text: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(text))
    except ValueError:
        raise UserError(f"the braces of '{text}' are not balanced: write for example {{000..007}}") from None


def _resolve(address: str, split: str | None) -> list[str]:
    scheme = address.partition(":")[0].lower()
    if address.lower().startswith(("http://", "https://")):
        if HIDDEN in address:
            raise UserError(
                f"'{address}' was stored without its password or signature: give the whole address in the command"
            )
        return [address]
    if address.lower().startswith("file://"):
        address = address[7:]
    elif "://" in address or scheme == "pipe":
        raise UserError(f"shards are read from files and http(s) addresses, got '{address}': download or mount them")
    path = Path(address).expanduser()
    if path.is_dir():
        found = _tars(path)
        if not found:
            path, _ = chosen_split(path, split)
            found = _tars(path) or _tars_of_only_split(path)
        else:
            found = one_split(found, split, path)
        if not found:
            raise UserError(f"the folder {path} holds no tar file")
        return sorted(map(str, found))
    if split is not None:
        raise UserError(f"{path} is no folder: leave out ?split={split}, or pass the folder above")
    if not path.is_file():
        raise UserError(f"no shard {path}")
    return [str(path)]


def _tars(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.endswith(_SUFFIXES) and not is_junk(file.name)]


def _tars_of_only_split(folder: Path) -> list[Path]:
    """Return the tar files of the only subfolder that has some, as CLIP_benchmark lays out a set of test images alone.

    Raises:
        UserError: its name says that it is not meant for tests, which nobody has chosen.
    """
    inside = [path for path in folder.iterdir() if path.is_dir() and not is_junk(path.name) and _tars(path)]
    if len(inside) != 1:
        return []
    name = inside[0].name
    if split_kind(name) not in (None, "test"):
        raise UserError(f"the only shards of {folder} are of the split '{name}': choose it with ?split={name}")
    return _tars(inside[0])


def _stem(address: str) -> str:
    name = without_secrets(address).partition("?")[0].rstrip("/").rpartition("/")[2]
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.endswith(suffix)), name)


# WebDataset shards: `wds:PATH` or `wds:URL`, tar files whose members share a key

_IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "jfif",
    "jpe",
    "jp2",
    "avif",
    "heic",
    "ppm",
    "pgm",
)
_LABELS = ("cls", "json", "txt")
_PIECE = 2**14
"""Bytes of a shard that are looked at in one place."""
_NAMES = "classnames.txt"
_TEMPLATES = "zeroshot_classification_templates.txt"
_JSON_KEYS = ("label", "cls", "class")


class WebDatasetSource(DataSource):
    """Samples of tar shards, streamed in order; ids are `SHARD/KEY`.

    A sample has an image (jpg, png, webp, ...) and a label: `cls` or `txt` with a number or class name, or `json` with
    one under `label`, `cls` or `class`. Class names come from --classes or a file `classnames.txt` beside the shards
    or one folder above, templates from `zeroshot_classification_templates.txt` there, as CLIP_benchmark lays them out.
    A damaged shard is one recorded fault; its other samples and the next shards are still read.

    Raises:
        UserError: the package `webdataset` is missing, no shard there, no sample in any, a label that is no class.
    """

    def __init__(
        self,
        shards: list[Shard],
        *,
        image: str | None = None,
        label: str | None = None,
        captions: str | None = None,
        spec: str = "wds",
    ) -> None:
        self._shards = shards
        self._images = (image,) if image else _IMAGES
        self._label_names = (label,) if label else tuple(kind for kind in _LABELS if kind != captions)
        self._captions = captions
        self._names_beside, about_names = _names_beside(shards)
        self._templates_beside, about_templates = _templates_beside(shards)
        names = max(filter(None, self._names_beside.values()), key=len, default=())
        super().__init__(spec, names, templates=next(filter(None, self._templates_beside.values()), DEFAULT))
        self.captioned = captions is not None
        self.remarks += [*about_names, *about_templates]

    @classmethod
    def from_spec(cls, spec: Spec) -> WebDatasetSource:
        """Open `wds:PATH_OR_URL[?image=EXTENSION&label=EXTENSION&captions=EXTENSION&split=NAME]`.

        `{000..007}` and folders give shards.
        """
        spec.check_options("image", "label", "captions", "split")
        _library()
        given = {name: spec.options.get(name) for name in ("image", "label", "captions")}
        return cls(find_shards(spec), spec=spec.text, **given)

    def require_names(self, given: Sequence[str] | Mapping[str, str] | None) -> None:
        """Refuse shards of several sets: the labels of one would be read by the names of another.

        A given list decides where all labels mean the same by it.
        """
        found = self._names_beside
        if len(set(found.values())) < 2:
            return
        if given is None:
            _require_one(found, _NAMES, "--classes FILE")
            return
        meant = [(folder, _meanings(names, given, str(folder))) for folder, names in found.items()]
        first, one = max(meant, key=lambda item: len(item[1]))
        for folder, other in meant:
            if any(mine != theirs for mine, theirs in zip(one, other, strict=False)):
                raise UserError(
                    f"the shards in {first} and {folder} have different {_NAMES} beside them, and by the names of "
                    "--classes, too, a label is not the same class in both: read one set at a time"
                )

    def things(self) -> tuple[str, ...]:
        """Return the names of all classes, of several sets those of each."""
        several = self._names_beside.values() if len(set(self._names_beside.values())) > 1 else ()
        return tuple(dict.fromkeys([*self.class_names, *(name for names in several for name in names or ())]))

    def require_templates(self) -> None:
        """Refuse templates that lie beside some of the shards, and not beside the others."""
        _require_one(self._templates_beside, _TEMPLATES, "--templates FILE")

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        any_sample, first_fault = False, ""
        for shard in self._shards:
            faults: list[str] = []
            seen: set[str] = set()
            for row in _rows(shard, faults):
                any_sample = True
                item = self._item(f"{shard.name}/{row['__key__']}", row, keep, seen)
                if item is not None:
                    yield item
            for fault in faults:
                first_fault = first_fault or fault
                yield Unreadable(shard.name, f"damaged shard: {fault}")
        if not any_sample:
            raise UserError(f"'{self.spec}' holds no sample" + (f": {first_fault}" if first_fault else ""))

    def _item(
        self, name: str, row: dict[str, Any], keep: Callable[[str], bool], seen: set[str]
    ) -> Sample | Unreadable | None:
        path = PurePosixPath(row["__key__"])
        if path.is_absolute() or ".." in path.parts:
            return Unreadable(name, "a key that leads out of its shard")
        if name in seen:
            return Unreadable(name, "the same key twice in one shard: the members of a sample must stand side by side")
        seen.add(name)
        if not keep(name):
            return None
        image = next((row[key] for key in self._images if key in row), None)
        if image is None:
            return Unreadable(name, f"no image among its members ({_members(row)})")
        label = next(((key, row[key]) for key in self._label_names if key in row), None)
        if label is None and self._captions is None:
            return Unreadable(name, f"no label among its members ({_members(row)})")
        # A number that says which image it is, as captioned sets have them, means no class where there are none.
        bare = label is None or (self._captions is not None and not self.class_names)
        meant = UNKNOWN if bare or label is None else self._meant(*label, f"'{name}'")
        captions = captions_of(_captions(row[self._captions])) if self._captions in row else ()
        return decode(name, image, meant, captions=captions)

    def _meant(self, kind: str, data: bytes, where: str) -> int:
        """Return the label as the source itself counts: by the names beside the shards, as long as there are any."""
        try:
            return _label(kind, data, self.marks or self.class_names, where)
        except UserError:
            if not self.marks or self._label_of is not None:
                raise
            return _label(kind, data, self.class_names, where)  # of the same order

    def _stored(self) -> Iterable[tuple[str, bytes]]:
        local = {shard.name: shard for shard in self._shards if shard.path}
        each = max(1, SAMPLED // max(1, len(local)))
        for name in select(local, SAMPLED):
            yield name, _pieces(local[name], each)
        # Of what is not at hand the place is all that is known; its name alone may be that of other shards elsewhere.
        yield from ((shard.name, without_secrets(shard.address).encode()) for shard in self._shards if not shard.path)

    def _identity(self) -> Iterable[str]:
        yield from (f"{shard.name} {shard.size}" for shard in self._shards)
        if self._captions is not None:
            yield f"captions {self._captions}"


def _pieces(shard: Shard, count: int) -> bytes:
    """Return pieces of a local shard, evenly apart."""
    try:
        with shard.open() as file:
            found = []
            for number in range(count):
                file.seek(number * shard.size // count)
                found.append(file.read(_PIECE))
            return b"".join(found)
    except OSError:
        return b""


def _library() -> Any:
    try:
        from webdataset import tariterators
    except ImportError:
        raise MissingExtra("webdataset", extra="wds") from None
    return tariterators


def _rows(shard: Shard, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard as `__key__` and members by extension; what goes wrong is added to `faults`."""

    def handler(error: Exception) -> bool:
        faults.append(one_line(error.args[0] if error.args else error))
        return True

    tar = _library()
    try:
        with shard.open() as stream:
            members = tar.tar_file_expander([{"url": shard.name, "stream": stream}], handler=handler)
            yield from tar.group_by_keys(members, handler=handler)
    except OSError as error:
        faults.append(one_line(error))


def _label(kind: str, data: bytes, class_names: Sequence[str], where: str) -> int:
    """Return the label in a member's bytes: a number, or the name of a class."""
    text = data.decode("utf-8", "replace").strip()
    value: Any = text
    if kind.endswith("json"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"the label of {where} is not valid JSON") from None
        if isinstance(value, dict):
            value = next((value[key] for key in _JSON_KEYS if key in value), None)
    return label_of(value if isinstance(value, str) else json.dumps(value), class_names, where)


def _captions(data: bytes) -> object:
    """Return the texts in a member: a JSON list (or one under "captions" or "caption"), else a text of lines."""
    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, dict):
        return value.get("captions", value.get("caption"))
    return value if isinstance(value, list | str) else text  # a text that happens to be JSON, as "5"


def _members(row: dict[str, Any]) -> str:
    return " ".join(sorted(key for key in row if not key.startswith("__")))[:80]


def _beside(shards: list[Shard], name: str) -> dict[Path, Path | None]:
    """Return, by folder of local shards, a file in it or one folder above, as CLIP_benchmark lays them out."""
    folders = list(dict.fromkeys(shard.path.parent for shard in shards if shard.path))
    return {
        folder: next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)
        for folder in folders
    }


def _require_one(found: Mapping[Path, Any], name: str, option: str) -> None:
    """Refuse what lies beside shards of several sets, and is not the same."""
    for (first, one), (folder, other) in pairwise(found.items()):
        if other != one:
            lacks = "; one of them has none" if None in (one, other) else ""
            raise UserError(
                f"the shards in {first} and {folder} have different {name} beside them{lacks}: "
                f"pass {option}, put the same file beside each, or read one set at a time"
            )


def _meanings(own: tuple[str, ...] | None, given: Sequence[str] | Mapping[str, str], where: str) -> tuple[str, ...]:
    """Return what each label is by the names given; labels without names of their own follow a list's order."""
    if own is None:
        if isinstance(given, Mapping):
            raise UserError(f"the shards in {where} have no {_NAMES} whose names --classes could change: give a list")
        return tuple(given)
    names = usual_names(own)
    settled = settle_names(Own(own, names), given, f"{_NAMES} beside the shards in {where}")
    places = range(len(names)) if settled.labels is None else settled.labels
    return tuple(settled.names[place] for place in places)


def _names_beside(shards: list[Shard]) -> tuple[dict[Path, tuple[str, ...] | None], list[str]]:
    """Return the names beside the shards, by folder, and what was noticed of them."""
    files = _beside(shards, _NAMES)
    read = {folder: None if file is None else read_class_names(file) for folder, file in files.items()}
    notes = [one[1] for one in read.values() if one is not None and one[1]]
    return {folder: one and tuple(one[0]) for folder, one in read.items()}, list(dict.fromkeys(notes))


def _templates_beside(shards: list[Shard]) -> tuple[dict[Path, tuple[str, ...] | None], list[str]]:
    """Return the templates beside the shards, by folder; there the place of the name is written {c}."""
    read: dict[Path, tuple[str, ...] | None] = {}
    for folder, file in _beside(shards, _TEMPLATES).items():
        read[folder] = None
        if file is not None:
            lines = [line.replace("{c}", "{}") for line in read_lines(file, "templates")]
            read[folder] = tuple(check_templates(lines, f"the templates file {file}"))
    found = next(filter(None, read.values()), None)
    return read, [f"{len(found)} prompt templates of {_TEMPLATES} beside the shards are used"] if found else []

"""From a data spec, such as `imagefolder:photos/val?links=1`, to the source it names, with its classes or without."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

from robustvlm.core import registry
from robustvlm.core.user_code import file_digest
from robustvlm.data import classes as words
from robustvlm.data.labels import Own, settle_names
from robustvlm.data.names import check_names, clean_name, readings, same_things
from robustvlm.data.source import UNKNOWN, DataSource, Sample, Unreadable
from robustvlm.data.trees import Forest, Tree, load_forest
from robustvlm.errors import UserError, nearest
from robustvlm.text import without_secrets

# From a data spec, such as `imagefolder:photos/val?links=1`, to the source it names

_CODE = re.compile(r"(-?\d+|n\d{8}|(class|label|c)[ _-]?\d+)($|[ ._-])", re.IGNORECASE)
_OPTIONS = re.compile(r"\w+=[^&?]*(&\w+=[^&?]*)*")


@dataclass(frozen=True)
class Spec:
    """A parsed data spec `KIND[:REST][?key=value&key=value]`; values may be percent-encoded.

    Of a source of your own, `MODULE:CALLABLE[?key=value]`, the module is the kind.

    `text` is without the passwords and signatures of URLs: it is what is stored and shown. `rest` has them.

    Example:
        >>> spec = parse_spec("parquet:cifar/test.parquet?label=fine_label")
        >>> spec.kind, spec.rest, dict(spec.options)
        ('parquet', 'cifar/test.parquet', {'label': 'fine_label'})
    """

    text: str
    kind: str
    rest: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def check_options(self, *known: str) -> None:
        """Refuse options other than the known ones."""
        for name in self.options:
            if name not in known:
                raise UserError(f"'{self.kind}' data has no option '{name}': {nearest(name, known)}")

    def flag(self, name: str) -> bool:
        """Return an on/off option, off when not given."""
        value = self.options.get(name, "0").lower()
        if value not in {"0", "1", "true", "false", "yes", "no"}:
            raise UserError(f"the option {name} must be 1 or 0, got '{value}'")
        return value in {"1", "true", "yes"}

    def path(self, what: str) -> Path:
        """Return the rest as a path, which must be there."""
        if not self.rest:
            raise UserError(f"'{self.text}' names no {what}: write {self.kind}:{what.upper()}")
        return Path(self.rest).expanduser()


def parse_spec(text: str) -> Spec:
    """Split a data spec into kind, rest and options.

    Raises:
        UserError: an unknown kind (the nearest are named), or an option given twice.
    """
    body, mark, tail = text.rpartition("?")
    if not mark or not _OPTIONS.fullmatch(tail) or _is_query(body, tail):
        body, tail = text, ""
    kind, _, rest = body.partition(":")
    if kind not in KINDS and not registry.names_own(body):
        raise UserError(f"unknown data kind '{kind}': {_hint(text, kind)}")
    pairs = [pair.split("=", 1) for pair in tail.split("&") if pair]
    options = {name: unquote(value) for name, value in pairs}
    if len(options) < len(pairs):
        raise UserError(f"an option is given twice in '{text}'")
    return Spec(without_secrets(text), kind, rest, options)


def open_data(
    spec: str, *, classes: Path | None = None, templates: Path | None = None, tree: Path | None = None
) -> DataSource:
    """Return the source a spec names, with class names, templates and tree from the files given, if any.

    Classes that are those of CIFAR-10, CIFAR-100 or ImageNet-1k come with templates and a tree.

    Raises:
        UserError: an unknown kind or option, missing data, no class names, or files that do not fit the data.

    Example:
        >>> source = open_data("emoji?split=test&copies=1")
        >>> source.tree[0].ancestor(source.class_names[0], 1)
        'mammal'
    """
    source = open_raw(parse_spec(spec))
    _settle(source, classes, f"'{spec}'")
    source.check()
    known = words.recognise(source.class_names) if source.tree is None else None
    if known is not None:
        source.tree = words.known_forest(known, source.class_names)
        if source.templates == words.DEFAULT:  # else they lie beside the data
            source.templates = known.templates
    if templates is not None:
        source.templates = words.read_templates(templates)
    else:
        source.require_templates()
    if tree is not None:
        source.tree = load_forest(tree, source.class_names)
    return source


def open_raw(spec: Spec) -> DataSource:
    """Return the source of a spec as it describes itself, its class names unsettled."""
    return KINDS[spec.kind](spec) if spec.kind in KINDS else _own(spec)


def _own(spec: Spec) -> DataSource:
    """Return the user's own source: `module:callable` is called with the options, as texts."""
    name = f"{spec.kind}:{spec.rest}"
    made = registry.call(name, registry.resolve(name), "a data source", **spec.options)
    has = ("ids", "_stream", "class_names")
    source: DataSource = registry.expect(name, made, DataSource, "a data source", has)
    ids = registry.call(name, source.ids, "ids")
    if ids is not None and not (isinstance(ids, list) and all(isinstance(item, str) for item in ids)):
        raise UserError(f"'{name}': ids() must return a list of texts or None, got {type(ids).__name__}")
    if ids is not None and len(set(ids)) < len(ids):
        raise UserError(f"'{name}': ids() names an image twice: every image needs an id of its own")
    source.spec, source.code = spec.text, file_digest(spec.kind)
    return source


def _settle(source: DataSource, classes: Path | None, where: str) -> None:
    """Bring together what the source calls its classes and what the user gave, and write down what was changed."""
    found = tuple(clean_name(name, where) for name in source.class_names)
    if source.captioned and not found and classes is None:
        return  # texts of their own are all there is to compare with
    names = words.usual_names(found)
    if names != found:
        source.remarks.append(f"ImageNet's usual class names are taken for: {words.what_changed(found, names)}")
    if names:
        check_names(names, where)
    given, note = words.read_class_names(classes) if classes is not None else (None, None)
    source.require_names(given)
    settled = settle_names(Own(source.marks, names or None), given, where)
    if source.tree is not None:
        if len(settled.names) != len(names):
            raise UserError(f"{where} has {len(names)} classes, the class names file {len(settled.names)}")
        source.tree = _renamed(source.tree, list(settled.names))
    source.settle(settled.names, settled.labels)
    source.remarks += [*([note] if note else []), *settled.notes, *_wordless(settled.names)]


def _wordless(names: tuple[str, ...]) -> list[str]:
    """Say of names that are no words that they are none: a text encoder makes little of them."""
    codes = [name for name in names if _CODE.match(name)]
    if not codes:
        return []
    return [
        f"{len(codes)} of {len(names)} class names are or begin with numbers or codes, as '{codes[0]}', which tell a "
        "text encoder little: --classes FILE gives words"
    ]


def is_code(name: str) -> bool:
    """Whether a class name is a number or a code alone, and no word of what the class is.

    Example:
        >>> [is_code(name) for name in ("7", "class_7", "n02085620", "n02085620-Chihuahua", "class")]
        [True, True, True, False, False]
    """
    found = _CODE.match(name)
    return found is not None and not readings(name[found.end() :])


def _is_query(body: str, tail: str) -> bool:
    """Tell whether what follows "?" belongs to an address on the net and is not our options."""
    return "://" in body and not all(pair.startswith(("image=", "label=")) for pair in tail.split("&"))


def _renamed(forest: Forest, names: list[str]) -> Forest:
    return Forest(
        tuple(Tree(tuple((name, *path[1:]) for name, path in zip(names, tree.paths, strict=True))) for tree in forest)
    )


def _hint(text: str, kind: str) -> str:
    """Guess what was meant by a spec without a kind."""
    path = Path(text)
    if text.endswith(".parquet"):
        return f"did you mean 'parquet:{text}'?"
    if text.endswith((".tar", ".tar.gz", ".tgz")):
        return f"did you mean 'wds:{text}'?"
    return f"did you mean 'imagefolder:{text}'?" if text and path.is_dir() else nearest(kind, KINDS)


def _emoji(spec: Spec) -> DataSource:
    from robustvlm.data.emoji import EmojiSource

    if spec.rest:
        raise UserError(f"emoji data takes options only, got '{spec.rest}': write for example emoji?split=test")
    return EmojiSource.from_options(spec.options)


def _lazy(module: str, name: str) -> Callable[[Spec], DataSource]:
    """Return an opener that imports its module when used: some need optional packages, all take time."""

    def opener(spec: Spec) -> DataSource:
        source: DataSource = getattr(import_module(f"robustvlm.data.{module}"), name).from_spec(spec)
        return source

    return opener


KINDS: registry.Table[Callable[[Spec], DataSource]] = registry.Table(
    __package__,
    {
        "emoji": _emoji,
        "imagefolder": _lazy("imagefolder", "ImageFolder"),
        "parquet": _lazy("parquet", "ParquetSource"),
        "torchvision": _lazy("torchvision_sets", "TorchvisionSource"),
        "hf": _lazy("hub", "HubSource"),
        "wds": _lazy("wds", "WebDatasetSource"),
    },
)
"""How each kind of data is opened; another kind is a file of this package that adds itself: `KINDS["mine"] = ...`."""


# Images whose classes do not matter: whatever a source calls them, they are unknown


class Unlabelled(DataSource):
    """The images of another source, of unknown class (-1); its labels need no names.

    Where `known` names classes that are known after all, images whose class says the same keep that class as their
    label, an index into `known`: they are not unknown, and whoever judges by them has to leave them out.

    Example:
        >>> source = open_unlabelled("emoji?split=test&copies=1")
        >>> {sample.label for sample in source.samples(limit=4)}
        {-1}
        >>> source = open_unlabelled("emoji?split=test&copies=1", known=["owl", "Apples"])
        >>> sorted({sample.label for sample in source.samples()})
        [-1, 0, 1]
    """

    def __init__(self, inner: DataSource, known: Sequence[str] = ()) -> None:
        super().__init__(inner.spec, ())
        if known:
            inner.require_names(None)
        self.inner = inner
        self.remarks = inner.remarks
        place = {name: number for number, name in enumerate(known)}
        self._known = {
            name: place[meant] for name, meant in same_things(inner.class_names, known, loosely=False).items()
        }

    def ids(self) -> list[str] | None:
        """Return the ids of the other source."""
        return self.inner.ids()

    def group(self, image_id: str) -> str:
        """Return the group that the other source puts an image in."""
        return self.inner.group(image_id)

    def things(self) -> tuple[str, ...]:
        """Return the names that the other source has for what its images show."""
        return self.inner.things()

    def check_label(self, label: int, where: str) -> None:
        """Take any label: it needs no name here."""

    def _stream(self, keep: Callable[[str], bool]) -> Iterator[Sample | Unreadable]:
        names = self.inner.class_names
        for item in self.inner._stream(keep):
            if not isinstance(item, Sample):
                yield item
                continue
            name = names[item.label] if 0 <= item.label < len(names) else None
            yield replace(item, label=UNKNOWN if name is None else self._known.get(name, UNKNOWN))

    def content(self) -> str | None:
        """Return the digest of the other source."""
        return self.inner.content()

    def _identity(self) -> Iterable[str]:
        return self.inner._identity()


def open_unlabelled(spec: str, known: Sequence[str] = ()) -> Unlabelled:
    """Return the images that a data spec names, as images of unknown class unless it is one of `known`.

    Raises:
        UserError: an unknown kind or option, or missing data.
    """
    return Unlabelled(open_raw(parse_spec(spec)), known)

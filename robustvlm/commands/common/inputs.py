"""The model and the data of a run: its images in source order, and what its manifest says of both."""

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from robustvlm.core import framing, object_graph, registry, size, user_code
from robustvlm.data import DataSource, Sample, Unreadable
from robustvlm.data.decode import prefetch
from robustvlm.defenses import Classifier
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM
from robustvlm.models.probe import probe_model
from robustvlm.models.zero_shot import cut_prompts
from robustvlm.runs.manifest import digest_of
from robustvlm.text import without_secrets

# Sets of unknown images, as `DATA` or `NAME=DATA`

_NAMED = re.compile(r"([A-Za-z0-9][\w-]{0,39})=(.+)")


def name_and_spec(text: str) -> tuple[str | None, str]:
    """Return the name that a set of images was given, if it was, and its data spec.

    Example:
        >>> name_and_spec("other=imagefolder:a=b"), name_and_spec("emoji?split=near")
        (('other', 'imagefolder:a=b'), (None, 'emoji?split=near'))
    """
    match = _NAMED.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)


def unknown_specs(texts: Sequence[str]) -> dict[str, str]:
    """Return the specs of sets of unknown images by what reports call them: their names, or else the specs.

    Raises:
        UserError: two sets would be called the same.

    Example:
        >>> unknown_specs(["other=imagefolder:pictures", "emoji?split=near"])
        {'other': 'imagefolder:pictures', 'emoji?split=near': 'emoji?split=near'}
    """
    found: dict[str, str] = {}
    for name, spec in map(name_and_spec, texts):
        called = name or without_secrets(spec)
        if called in found:
            other = setting("ood", f"NAME={without_secrets(spec)}")
            raise UserError(f"two sets of unknown images are called '{called}': name them, as {other}")
        found[called] = spec
    return found


# The images of an attack run: numbered in source order, decoded and resized ahead of the model


@dataclass(frozen=True)
class Picture:
    """One image as the model takes it: pixels [3, H, W] in [0, 1]; label -1 is an unknown class.

    `source_size` is width and height of the image before it was resized.
    """

    id: str
    label: int
    pixels: Tensor = field(repr=False)
    source_size: tuple[int, int] = (0, 0)


class Images:
    """Streams the images of a source, any number of times.

    Args:
        source: the images; limit: how many of them, chosen by a hash of their ids.
        resolution: side in pixels or (height, width), or a model's framing, which also says how it is brought about.
        ahead: how many images are made ready in the background; they are held in memory. 0 for a model on the CPU,
            which leaves no core idle.

    Example:
        >>> from robustvlm.data import open_data
        >>> images = Images(open_data("emoji"), limit=3, resolution=8)
        >>> [images.index(item.id) for item in images.stream()]
        [0, 1, 2]
    """

    def __init__(
        self,
        source: DataSource,
        *,
        limit: int | None = None,
        resolution: size.Size | framing.Framing,
        ahead: int = 0,
    ) -> None:
        self.source, self.limit = source, limit
        self.framing, self._ahead = framing.Framing.of(resolution), ahead
        self._order: dict[str, int] = {}

    def index(self, name: str) -> int:
        """Return the number in source order of an image that a stream has come by; the same in every session."""
        return self._order[name]

    def stream(self, want: Callable[[str], bool] | None = None) -> Iterator[Picture | Unreadable]:
        """Yield the images that are wanted, asked for by id once their number is known; unwanted ones are not decoded.

        Streams also name what no one asked for: damaged shards, and second images of the same name.
        """

        def keep(name: str) -> bool:
            self._order.setdefault(name, len(self._order))
            return want is None or want(name)

        ready = self._ready(keep)
        return prefetch(ready, self._ahead) if self._ahead else ready

    def _ready(self, keep: Callable[[str], bool]) -> Iterator[Picture | Unreadable]:
        for item in self.source.samples(limit=self.limit, keep=keep):
            self._order.setdefault(item.id, len(self._order))  # the faults of a stream are not asked for
            if isinstance(item, Sample):
                pixels = framing.to_pixels(item.image, self.framing)
                yield Picture(item.id, item.label, pixels, item.image.size)
            else:
                yield item


# What the manifest of a run says of its data, what a reader has to know of it, and how its model is known again

_PROMPTS = 4
_FACTS = ("spec", "fingerprint", "image_size", "logit_scale")


def probe_of(
    model: VLM | Classifier,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    *,
    resolution: size.Size | None = None,
) -> dict[str, Any]:
    """Return the model's answers to fixed inputs, for the manifest: what it is known by besides its digest.

    Of an encoder they are features of images and of a few of the prompts; of a classifier also its class vectors and
    its outputs.

    Args:
        resolution: of the run's images, where it is not the model's own.
    """
    classifier = isinstance(model, Classifier)
    vectors = model.class_embeddings if isinstance(model, Classifier) else None
    return probe_model(
        model,
        image_size=resolution or model.image_size,
        device=model.device,
        texts=[templates[0].replace("{}", name) for name in class_names[:_PROMPTS]] if templates else (),
        class_vectors=vectors,
        outputs=classifier,
    )


def joined_probes(probes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the probes of several models as one, whose parts say of which model they are; the keys name the models.

    Example:
        >>> joined_probes({"a": {"format": 1, "parts": {"outputs": {}}}, "b": {"format": 1, "parts": {"outputs": {}}}})
        {'format': 1, 'parts': {'outputs (a)': {}, 'outputs (b)': {}}}
    """
    parts = {f"{name} ({model})": part for model, one in probes.items() for name, part in one["parts"].items()}
    return dict(next(iter(probes.values()))) | {"parts": parts}


def facts_of(model: VLM | Classifier, *more: str) -> dict[str, Any]:
    """Return the facts that identify a model, and of its attributes `more`; a run's default name is a digest of them.

    Example:
        >>> from robustvlm.models import load_model
        >>> list(facts_of(load_model("tiny"), "interpolation"))
        ['spec', 'fingerprint', 'image_size', 'logit_scale', 'interpolation']
    """
    return {name: getattr(model, name) for name in (*_FACTS, *more)}


def describe_data(source: DataSource) -> dict[str, Any]:
    """Return the facts that identify the images and their classes."""
    return describe_images(source) | {
        "class_names": list(source.class_names),
        "templates": list(source.templates),
    }


def describe_images(source: DataSource) -> dict[str, Any]:
    """Return the facts that identify the images alone."""
    ids, content = source.ids(), source.content()
    for name in (ids or [])[:1]:
        source.group(name)  # which is asked when all is done: what is wrong with it is found before
    return {
        "spec": source.spec,
        "fingerprint": source.fingerprint(),
        "images": None if ids is None else len(ids),
    } | ({} if content is None else {"content": content})


def contents_of(sources: Mapping[str, DataSource | None]) -> dict[str, Any]:
    """Return the digests of what further data hold, by name, as far as there are any."""
    found = {name: None if source is None else source.content() for name, source in sources.items()}
    told = {name: content for name, content in found.items() if content is not None}
    return {"contents": told} if told else {}


def named_files_of(source: DataSource, **files: Path | None) -> dict[str, str]:
    """Return a digest of the class trees of the data, and of the files that are given, under the names of settings.

    A setting holds a path, and what stands there may change: a finished run would be shown as one of the new content.
    What is no regular file, as a shell's pipe, can be read once and has none.

    Raises:
        UserError: no such file.
    """
    found = {}
    if source.tree is not None:
        found["tree"] = object_graph.fingerprint({}, (json.dumps([tree.paths for tree in source.tree]),))
    for name, path in files.items():
        if path is not None and not path.exists():
            raise UserError(f"no file at {path}: {setting(name)} takes one that is there")
        if path is not None and path.is_file():
            found[name] = digest_of(path)
    return found


def code_facts(names: Iterable[str]) -> dict[str, str]:
    """Return a digest of every user's object among the names: its source file, and what it can reach of settings.

    It goes into the manifest, so that a run is not gone on with under changed code of the same name. Built-in names,
    whose version the manifest has, are left out.

    Example:
        >>> code_facts(["pgd", "apgd-t:steps=9"])
        {}
    """
    found = {}
    for name in names:
        spec = ":".join(name.split(":")[:2])
        if registry.names_own(spec):
            reached = object_graph.Reached(list(_parts(registry.resolve(spec))))
            facts = (spec, user_code.file_digest(spec.partition(":")[0]), *reached.facts)
            found[f"code of {spec}"] = object_graph.fingerprint(reached.state(), facts)
    return found


def _parts(thing: object) -> Iterator[object]:
    """Yield what decides an object's results: of a class its functions and plain attributes, and those of its bases."""
    if not isinstance(thing, type):
        yield thing
        return
    for kind in thing.__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "robustvlm", "abc", "typing"):
            continue
        for name, value in sorted(vars(kind).items()):
            written = isinstance(value, types.FunctionType) and not value.__code__.co_filename.startswith("<")
            if written or (not name.startswith("__") and isinstance(value, bool | int | float | str | tuple)):
                yield [f"{kind.__qualname__}.{name}", value]


def remarks_of(source: DataSource, model: VLM | Classifier) -> list[str]:
    """Return what was left aside or understood in some way in the data; what was taken for granted of the model, which
    prompts it does not read whole, and what its logits leave out.

    They are said on the terminal and in the manifest, and are no part of what defines a run.

    Example:
        >>> from robustvlm.data import open_data
        >>> from robustvlm.models import load_model
        >>> remarks_of(open_data("emoji"), load_model("tiny"))
        []
    """
    vlm = model.vlm if isinstance(model, Classifier) else model
    cut = None if vlm is None else cut_prompts(vlm, source.class_names, source.templates)
    bias = getattr(vlm, "logit_bias", None)
    left_out = [] if bias is None else [f"a bias of {bias:.4g}, the same for every class, is left out of the logits"]
    return [*taken_for_granted(model), *source.remarks, *([cut] if cut else []), *left_out]


def taken_for_granted(model: VLM | Classifier) -> list[str]:
    """Return what could not be checked of a model, or of any that it stands on.

    Example:
        >>> from robustvlm.models import load_model
        >>> taken_for_granted(load_model("tiny"))
        []
    """
    parts = [part for part in model.modules() if isinstance(part, VLM | Classifier)]
    return list(dict.fromkeys(remark for part in parts for remark in part.remarks))

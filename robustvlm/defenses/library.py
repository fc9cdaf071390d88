"""Classifiers of timm and torchvision: `timm:NAME`, `torchvision:NAME.TAG`, or either with a checkpoint, `NAME/FILE`.

Each is one object with pixels in [0, 1] in and logits out, whose normalisation, size, filter and crop are those of the
library's own config, and whose columns are the classes of the data, matched by name.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm import text
from robustvlm.core.boundary import same_process, same_random_state
from robustvlm.core.framing import Framing
from robustvlm.core.network import download_seconds, within
from robustvlm.core.registry import LIBRARIES
from robustvlm.core.size import as_size, size_text
from robustvlm.data.classes import imagenet_names, made_distinct, read_class_names, usual_names, wordnet_names
from robustvlm.errors import UserError, nearest
from robustvlm.models import VLM
from robustvlm.models.checkpoints import find_weights
from robustvlm.models.clip import require_same_pixels
from robustvlm.models.weights import SUFFIXES, brief, hub_file, read_checkpoint
from robustvlm.models.zoo import split_part

CLASSES = "classes.txt"
"""Beside a checkpoint: its classes in the order of the outputs, one a line."""
_IMAGENET = 1000
# Networks of torchvision that bring ImageNet's mean and deviation to 0.5 by themselves, if they were made for it.
_SCALED_INSIDE = ("googlenet", "inception_v3")
# A class that every copy of an image is sure of gets this share of a smoothed classifier's softmax.
_SURE = 0.99
_log = logging.getLogger("robustvlm")


def names_library_model(spec: str) -> bool:
    """Whether a spec names a classifier of a library.

    Example:
        >>> names_library_model("timm:resnet18/best.pt"), names_library_model("my.module:net")
        (True, False)
    """
    return spec.partition(":")[0] in LIBRARIES and ":" in spec


class LibraryClassifier(nn.Module):
    """A classifier of a library: pixels [B, 3, S, S] in [0, 1] to logits [B, K], one column for each of `class_names`.

    `identity` names what the weights and buffers do not hold; `remarks` what was taken for granted of it; the fields
    of `Framing` say how images become pixels.
    """

    mean: Tensor
    std: Tensor
    columns: Tensor

    def __init__(
        self,
        net: nn.Module,
        recipe: Recipe,
        class_names: Sequence[str],
        *,
        spec: str,
        name: str,
        remarks: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.net, self.spec, self.recipe, self.remarks = net, spec, recipe, remarks
        self.class_names, self.identity = tuple(class_names), name
        for option, value in recipe.framing.options().items():
            setattr(self, option, value)
        self.register_buffer("mean", torch.tensor(recipe.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(recipe.std).view(1, 3, 1, 1))
        self.register_buffer("columns", torch.arange(len(self.class_names)))
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [B, K]."""
        logits: Tensor = self.net((pixels - self.mean) / self.std)
        return logits[:, self.columns]

    def for_classes(self, wanted: Sequence[str]) -> LibraryClassifier:
        """Put the columns into the order of the classes wanted, and leave the others out.

        Raises:
            UserError: a class that the model does not know.
        """
        self.columns = self.columns[torch.tensor(places_of(wanted, self.class_names, self.spec))]
        self.class_names = tuple(wanted)
        return self


class ClassifierVLM(VLM):
    """A classifier as an encoder, for what averages features (`+smooth`) or counts the classes of noisy copies (votes).

    A feature is the square root of the softmax, which has unit norm, and each class is an axis: the class of an image
    is the same. `logit_scale` gives a class that is certain in every copy a probability of 99 %.
    """

    def __init__(self, model: LibraryClassifier) -> None:
        names = model.class_names
        scale = math.log(_SURE / (1 - _SURE) * (len(names) - 1))
        super().__init__(spec=model.spec, logit_scale=scale, **model.recipe.framing.options())
        self.model, self.remarks = model, model.remarks
        self.eval().requires_grad_(False)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return (0.5 * self.model(pixels).log_softmax(dim=1)).exp()

    def _text_features(self, texts: list[str]) -> Tensor:
        del texts
        raise UserError(f"'{self.spec}' is a classifier and has no text encoder: pass a vision-language model")

    def class_vectors(self, class_names: Sequence[str]) -> Tensor:
        """Return the axes [K, D] of the classes."""
        places = places_of(class_names, self.model.class_names, self.spec)
        return torch.eye(len(self.model.class_names), device=self.device)[places]

    def _identity(self) -> Iterable[str]:
        return (self.model.identity,)


def require_texts(vlm: VLM, what: str) -> None:
    """Refuse a classifier of a library, or a model that stands on one, where texts are needed.

    Args:
        what: needs them.

    Raises:
        UserError: it is one.
    """
    if any(isinstance(part, ClassifierVLM) for part in vlm.modules()):
        raise UserError(
            f"'{vlm.spec}' is a classifier without a text encoder, which {what} needs: pass a CLIP-like model"
        )


def places_of(wanted: Sequence[str], known: Sequence[str], spec: str) -> list[int]:
    """Return where each class wanted stands among those a model knows.

    Both lists are read as those of data are: ImageNet's ids count as their names, and its lists of synonyms, or with a
    name twice, as its usual names.

    Raises:
        UserError: a class that the model does not know, or knows several of, or two that are one of the model's.

    Example:
        >>> places_of(["dog", "Ice_Cream"], ["ice cream", "cat", "dog"], "m")
        [2, 0]
    """
    ids = wordnet_names()
    named = tuple(ids.get(name, name) for name in known)
    readings = (tuple(known), named, made_distinct(known)[0], usual_names(known))
    tried = [_in_reading(wanted, reading, ids) for reading in dict.fromkeys(readings)]
    found = next((places for places in tried if None not in places), tried[0])
    missing = [name for name, place in zip(wanted, found, strict=True) if place is None]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        alike = [name for name in known if text.name_key(name) == text.name_key(missing[0])]
        if alike:
            listed = ", ".join(f"'{name}'" for name in alike)
            raise UserError(
                f"'{spec}' has several classes like '{missing[0]}' of the data: {listed}; write it as one is"
            )
        raise UserError(
            f"'{spec}' does not know the class '{missing[0]}'{more} of the data; its {len(known)} classes begin with "
            f"'{known[0]}': {nearest(missing[0], known)}"
        )
    places = [place for place in found if place is not None]
    require_once(wanted, places, f"'{spec}'")
    return places


def _in_reading(wanted: Sequence[str], known: Sequence[str], ids: Mapping[str, str]) -> list[int | None]:
    by_id = text.places_of([ids.get(name, name) for name in wanted], known)
    by_name = text.places_of(wanted, known)
    return [place if place is not None else other for place, other in zip(by_name, by_id, strict=True)]


def require_once(wanted: Sequence[str], places: Sequence[int], where: str) -> None:
    """Refuse two classes of the data that are one of a model: both would have its logit."""
    seen: dict[int, str] = {}
    for name, place in zip(wanted, places, strict=True):
        if place in seen:
            raise UserError(f"'{seen[place]}' and '{name}' of the data are one class of {where}: keep one of them")
        seen[place] = name


# From a spec to the classifier


@dataclass(frozen=True)
class Recipe:
    """How a library brings images to a model: the framing, the channels' mean and deviation, and its own transform."""

    framing: Framing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transform: Callable[[Any], Any]


class _Library(ABC):
    """What differs between libraries; a name may end in the tag of published weights, as `resnet50.a1_in1k`."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the architectures."""

    @abstractmethod
    def tags(self, name: str) -> list[str]:
        """Return the tags of an architecture's published weights."""

    @abstractmethod
    def make(self, name: str, classes: int | None) -> nn.Module:
        """Return a network without weights, for so many classes or the library's own number."""

    @abstractmethod
    def fetch(self, name: str, advice: str) -> nn.Module:
        """Return a network with its published weights; an error of the network ends in `advice`."""

    @abstractmethod
    def recipe(self, net: nn.Module, name: str) -> Recipe:
        """Return how the library itself brings images to a network."""


class _Timm(_Library):
    def names(self) -> list[str]:
        import timm

        return list(timm.list_models())

    def tags(self, name: str) -> list[str]:
        from timm.models import get_arch_pretrained_cfgs

        return [tag.partition(".")[2] for tag in get_arch_pretrained_cfgs(name) if "." in tag]

    def make(self, name: str, classes: int | None) -> nn.Module:
        import timm

        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        net: nn.Module = timm.create_model(name, pretrained=False, **options)
        return net

    def fetch(self, name: str, advice: str) -> nn.Module:
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise UserError(f"timm has no published weights of '{name}': {advice}")
        overlay = {}
        if config.hf_hub_id and not config.custom_load:
            files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
            overlay["file"] = str(hub_file(config.hf_hub_id, files, advice=advice))
        net: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        return net

    def recipe(self, net: nn.Module, name: str) -> Recipe:
        from timm.data import create_transform, resolve_model_data_config

        config = resolve_model_data_config(net)
        channels, *kept = config["input_size"]
        share, mode = float(config["crop_pct"]), config["crop_mode"]
        if channels != 3 or (mode != "center" and share != 1.0):
            raise UserError(
                f"'timm:{name}' takes images of {channels}x{kept[0]}x{kept[1]}, crop '{mode}' of {share:g}: only RGB "
                "images are supported, whole or cropped at the centre"
            )
        modes = {"center": "shortest", "squash": "squash"}
        if mode not in modes:
            raise UserError(f"'timm:{name}' frames images by '{mode}': only {' and '.join(modes)} are supported")
        size, scaled = as_size(kept), as_size([math.floor(side / share) for side in kept])
        framing = Framing(size, config["interpolation"], modes[mode], short_side=0 if scaled == size else scaled)
        transform = create_transform(**config, is_training=False)
        return Recipe(framing, tuple(config["mean"]), tuple(config["std"]), transform)


class _Torchvision(_Library):
    def names(self) -> list[str]:
        from torchvision import models

        return list(models.list_models(module=models))

    def tags(self, name: str) -> list[str]:
        from torchvision.models import get_model_weights

        return [weights.name for weights in get_model_weights(name)]

    def make(self, name: str, classes: int | None) -> nn.Module:
        from torchvision.models import get_model

        architecture = name.partition(".")[0]
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        # As with published weights, whose mean and deviation the layers expect; the library's default is without.
        options |= {"transform_input": True} if architecture in _SCALED_INSIDE else {}
        net: nn.Module = get_model(architecture, weights=None, **options)
        return net

    def fetch(self, name: str, advice: str) -> nn.Module:
        del advice  # it fails at once
        from torchvision.models import get_model

        net: nn.Module = get_model(name.partition(".")[0], weights=self._weights(name))
        return net

    def recipe(self, net: nn.Module, name: str) -> Recipe:
        del net
        transform = self._weights(name).transforms()
        (side,), (scaled,) = set(transform.crop_size), set(transform.resize_size)
        framing = Framing(side, transform.interpolation.value, short_side=0 if scaled == side else scaled)
        return Recipe(framing, tuple(transform.mean), tuple(transform.std), transform)

    def _weights(self, name: str) -> Any:
        from torchvision.models import get_model_weights

        name, _, tag = name.partition(".")
        return get_model_weights(name)[tag or "DEFAULT"]


_LIBRARIES: dict[str, _Library] = {"timm": _Timm(), "torchvision": _Torchvision()}


def load_library(spec: str) -> LibraryClassifier:
    """Return the classifier that `LIBRARY:NAME[.TAG][/FILE]` names, with the classes that it knows.

    The number of classes is the checkpoint's. They are those of `classes.txt` beside it, else ImageNet-1k's for 1000.

    Raises:
        UserError: no such model, its weights cannot be had or do not fit, nothing says what its classes are, or the
            library brings images to it in a way that cannot be had here.
    """
    kind, _, rest = spec.partition(":")
    name, _, source = rest.partition("/")
    library = _LIBRARIES[kind]
    _require_name(library, kind, name)
    file, part = split_part(os.path.expanduser(source))
    with same_random_state(), same_process():
        if source:
            if Path(file).suffix not in SUFFIXES and not os.path.exists(file):
                raise UserError(f"'{spec}': no file '{file}'; published weights are named '{kind}:{name}.TAG'")
            net = _from_file(library, name, Path(file), part, spec)
            known, remarks = _classes_beside(Path(file), _outputs(net), spec)
            if getattr(net, "transform_input", False):
                if "." not in name and _outputs(net) != _IMAGENET:
                    raise UserError(
                        f"the file of '{spec}' does not say whether the network scales its input (transform_input): if "
                        f"it began from published weights, it does: write '{kind}:{name}.{library.tags(name)[0]}"
                        "/FILE'; else load it as module:callable"
                    )
                remarks += (
                    f"the file of '{spec}' does not say whether the network scales its input (transform_input): it is "
                    "taken to, as with published weights; if it was trained without them, every figure is wrong",
                )
        else:
            net = _fetched(library, name, spec)
            known, remarks = (
                _imagenet(_outputs(net), spec, f"save its state dict as a file with {CLASSES} beside it"),
                (),
            )
        recipe = library.recipe(net, name)
        identity = f"{kind} {name.partition('.')[0]}"
        model = LibraryClassifier(net, recipe, known, spec=spec, name=identity, remarks=remarks)
    require_same_pixels(recipe.transform, recipe.framing, model.mean, model.std, spec, kind)
    if source and "." not in name and len(library.tags(name)) > 1:
        framing = recipe.framing
        sizes = f"{size_text(framing.image_size)} of {size_text(framing.scaled)} pixels"
        _log.warning(
            "the file of '%s' does not say how images were brought to it: they are as to the library's default weights "
            "(%s); '%s:%s.TAG/FILE' takes those of other weights",
            spec,
            f"{sizes}, {framing.interpolation}",
            kind,
            name,
        )
    return model


def _require_name(library: _Library, kind: str, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if architecture not in library.names():
        raise UserError(f"{kind} has no model '{architecture}': {nearest(architecture, library.names())}")
    if tag and tag not in library.tags(architecture):
        tags = library.tags(architecture)
        raise UserError(f"{kind} has no weights '{tag}' of '{architecture}': {nearest(tag, tags)}")


def _fetched(library: _Library, name: str, spec: str) -> nn.Module:
    advice = f"check the network, or pass a local file as '{spec}/FILE'"
    try:
        return within(download_seconds(), partial(library.fetch, name, advice))
    except UserError:
        raise
    except Exception as error:  # urllib's, the library's own
        raise UserError(f"could not fetch '{spec}' ({brief(error)}): {advice}") from error


def _from_file(library: _Library, name: str, file: Path, part: str | None, spec: str) -> nn.Module:
    """Return the network with a checkpoint's weights, and as many classes as that has."""
    content, what = read_checkpoint(file), f"'{file}'"
    try:
        net = library.make(name, None)
        count = _classes_of(net, content, part)
        net = net if count is None else library.make(name, count)
    except UserError:
        raise
    except Exception as error:  # libraries fail in any way
        raise UserError(f"'{spec}' cannot be built: {brief(error)}") from error
    found = find_weights(net, content, what=what, part=part, convert=_as_they_are)
    # Its own state first: that carries the versions that some layers ask for.
    state = net.state_dict()
    state.update(found.weights)
    net.load_state_dict(state)
    return net


def _as_they_are(_: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights)


def _classes_of(net: nn.Module, content: Mapping[str, Any], part: str | None) -> int | None:
    """Return how many classes a checkpoint has where they are others than a network's: the first axis of its heads."""
    own, default = net.state_dict(), _outputs(net)
    heads = {name for name, tensor in own.items() if tensor.ndim and len(tensor) == default}
    counts: set[int] = set()

    def headless(_: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fitting = {name for name in heads & weights.keys() if weights[name].shape[1:] == own[name].shape[1:]}
        counts.update(len(weights[name]) for name in fitting)
        return {name: own[name] if name in fitting else tensor for name, tensor in weights.items()}

    with contextlib.suppress(UserError):  # said in full when the weights are loaded
        find_weights(net, content, what="", part=part, convert=headless)
        counts.discard(default)
        return counts.pop() if len(counts) == 1 else None
    return None


def _outputs(net: nn.Module) -> int:
    """Return how many logits a network gives: timm says it, of torchvision's the last layer."""
    known = getattr(net, "num_classes", None)
    if isinstance(known, int) and known > 0:
        return known
    heads = [part for part in net.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    last = heads[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


def _classes_beside(file: Path, count: int, spec: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes of a checkpoint, and what was taken for granted of them."""
    listed, advice = (
        file.parent / CLASSES,
        f"put {CLASSES} beside '{file}', one name a line in the order of the outputs",
    )
    if not listed.is_file():
        known = _imagenet(count, spec, advice)
        taken = (
            f"nothing says what the {count} outputs of '{spec}' mean: ImageNet-1k's classes in their usual order are"
        )
        return known, (f"{taken} taken; if they are others, every figure here is wrong, so {advice}",)
    names, _ = read_class_names(listed)
    if not isinstance(names, tuple) or len(names) != count:
        raise UserError(f"'{listed}' lists {len(names)} classes, and '{file}' has {count}: one line for each output")
    return names, ()


def _imagenet(count: int, spec: str, advice: str) -> tuple[str, ...]:
    if count != _IMAGENET:
        raise UserError(f"'{spec}' has {count} classes, and nothing says which: {advice}")
    return imagenet_names()

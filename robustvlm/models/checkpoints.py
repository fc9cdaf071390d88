"""Which tensors of a checkpoint are a model's weights: found under any wrapper by fitting them to the model's names.

Training leaves weights inside dicts (`state_dict`, `module`, `model_ema`) and behind prefixes of torch.compile, DDP,
FSDP, Lightning, in any order, at times inside a tower. No prefix is known here by name alone: of all ways to read a
file that one counts under which every weight of the model is there, once and in its shape, and none is left over; names
of other libraries' layouts (OpenAI, transformers) are translated first.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustvlm.errors import UserError
from robustvlm.models.weights import require_finite

# The layouts in which CLIP's weights are published, brought to the names of an open_clip model


def from_open_clip(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights after open_clip's own conversions of older layouts for `model`.

    Its resampling of position embeddings to another image or context size is none of them: that makes another model.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    found: dict[str, torch.Tensor] = convert_state_dict(model, dict(weights))
    own = model.state_dict()
    if "positional_embedding" in found and "positional_embedding" not in own:
        found = convert_to_custom_text_state_dict(found)
    found.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        if name in found and name in own and found[name].numel() == 1:
            found[name] = found[name].reshape(own[name].shape)
    return found


# CLIP as transformers names it: each row of a pattern and what open_clip calls the same tensor.

_LAYER = (
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)
_BESIDE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    **{f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in (
        ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"),
    ) for kind in ("weight", "bias")},
}  # fmt: skip
_PLACE = re.compile(
    r"(?P<before>(?:.+?\.)??)(?:(?P<tower>vision|text)_model\.)?"
    r"(?P<rest>embeddings\..*|encoder\.layers\..*|(?:pre_layrnorm|post_layernorm|final_layer_norm)\..*)"
)
_PROJECTION = re.compile(r"(?P<before>(?:.*\.)?)(?P<tower>visual|text)_projection\.weight")
_QKV = re.compile(r"(?P<stem>.*)self_attn\.(?P<which>[qkv])_proj\.(?P<kind>weight|bias)")


def from_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return the weights of a CLIP of transformers, or of one of its towers, under open_clip's names; None for others.

    Queries, keys and values become one tensor, projections are transposed; what stands before a name stays there.

    Example:
        >>> found = from_transformers({"text_model.embeddings.token_embedding.weight": torch.ones(9, 4),
        ...                            "text_projection.weight": torch.ones(2, 4)})
        >>> {name: list(tensor.shape) for name, tensor in found.items()}
        {'token_embedding.weight': [9, 4], 'text_projection': [4, 2]}
    """
    bare = _tower_of(weights)
    if bare is None:
        return None
    found: dict[str, torch.Tensor] = {}
    apart: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        if (match := _PROJECTION.fullmatch(key)) is not None:
            name = "visual.proj" if match["tower"] == "visual" else "text_projection"
            found[match["before"] + name] = tensor.T if tensor.ndim == 2 else tensor
        elif (match := _PLACE.fullmatch(key)) is not None:
            tower = "visual." if (match["tower"] or bare) == "vision" else ""
            name = match["before"] + tower + _renamed(match["rest"])
            if (part := _QKV.fullmatch(name)) is not None:
                apart.setdefault(f"{part['stem']}attn.in_proj_{part['kind']}", {})[part["which"]] = tensor
            else:
                found[name] = tensor
        else:
            found[key] = tensor
    for name, parts in apart.items():
        if parts.keys() == set("qkv"):  # else the name stays missing, and is said to be
            found[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return found


def _tower_of(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Return which tower keys without "vision_model" or "text_model" belong to; None for no layout of transformers."""
    if any(key.endswith("embeddings.patch_embedding.weight") for key in weights):
        return "vision"
    return "text" if any(key.endswith("embeddings.token_embedding.weight") for key in weights) else None


def _renamed(rest: str) -> str:
    if rest in _BESIDE:
        return _BESIDE[rest]
    rest = re.sub(r"^encoder\.layers\.", "transformer.resblocks.", rest)
    for theirs, ours in _LAYER:
        rest = re.sub(rf"(?<=\d\.){theirs}\.", f"{ours}.", rest)
    return rest


# Weights under any wrapper

# Parts of a name that wrappers put in, which may stand anywhere in it: they name no module of the model.
_TRANSPARENT = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
_DEEPEST = 4
# A prefix that leads to fewer of a model's names than this is none: a head, a teacher of another kind.
_LEAST = 0.25

Convert = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Found:
    """Weights of a checkpoint that fit a model.

    Attributes:
        weights: under the model's own names.
        tower: "vision" or "text" where the file holds that tower alone, None for a whole model.
        place: where in the file they stand, as `FILE#PLACE` names it; "." for the top.
        logit_bias: what the sigmoid loss adds to all logits, where the file has it and the model has no place for it.
    """

    weights: dict[str, Tensor] = field(repr=False)
    tower: str | None
    place: str
    logit_bias: float | None = None


@dataclass(frozen=True, eq=False)
class _Reading:
    """One way to read a file, and what speaks against it.

    Attributes:
        faults: wrong shapes, missing and unknown names, each in words.
        outside: weights that stand beside the place, which nobody named.
    """

    found: Found
    faults: tuple[list[str], list[str], list[str]]
    outside: list[str]

    @property
    def count(self) -> int:
        return sum(map(len, self.faults)) + len(self.outside)


def find_weights(
    model: nn.Module,
    content: Mapping[str, Any],
    *,
    what: str,
    part: str | None = None,
    convert: Convert = from_open_clip,
) -> Found:
    """Return the weights for `model` in what a checkpoint holds, without loading them.

    Numbers and counters beside them (epoch, optimiser, `num_batches_tracked`, OpenAI's `input_resolution`) are passed
    over; weights that are no part of the model are not.

    Args:
        content: as `read_checkpoint` returns it. what: how errors call it. part: the place to look at, as `Found.place`
            names it. convert: brings weights in other layouts under the model's names.

    Raises:
        UserError: nothing fits, naming the first keys and shapes that do not; several different sets of weights fit;
            two tensors have one name; a weight is NaN or infinite.

    Example:
        >>> content = {"epoch": 3, "ema": {"module.weight": torch.ones(1, 2), "module.bias": torch.ones(1)}}
        >>> find_weights(nn.Linear(2, 1), content, what="a.pt")
        Found(tower=None, place='ema', logit_bias=None)
        >>> find_weights(nn.Linear(3, 1), content, what="a.pt")
        Traceback (most recent call last):
        robustvlm.errors.UserError: a.pt does not fit the model: 'weight' is [1, 2], the model needs [1, 3]
    """
    readings = list(_readings(model, content, part, convert))
    if not readings:
        places = list(dict.fromkeys(".".join(path) or "." for path, _ in _groups(content)))
        if part is None or not places:
            raise UserError(f"{what} holds no named tensors: save model.state_dict()")
        named = [place for place in places if place != "."]
        has = f"it has {', '.join(named)}" if named else f"all its tensors stand at the top, so leave out #{part}"
        raise UserError(f"{what} holds no weights named '{part}': {has}")
    # The vision tower of a whole model fits as well.
    for tower in (None, "vision", "text"):
        near = [reading for reading in readings if reading.found.tower == tower and not any(reading.faults)]
        different = _different([reading.found for reading in near])
        if any(not reading.outside for reading in near) or len(different) > 1:
            break
    if len(different) > 1:
        places = [found.place for found in different]
        raise UserError(
            f"{what} holds several sets of weights that fit, {' and '.join(places)}: name one of them behind the file, "
            f"as FILE#{places[-1]}"
        )
    if not different or all(reading.outside for reading in near):
        raise UserError(_misfit(min(readings, key=lambda reading: reading.count), what))
    require_finite(different[0].weights, what)
    return different[0]


def fit_weights(model: nn.Module, content: Mapping[str, Any], *, what: str, part: str | None = None) -> Found:
    """Copy what `find_weights` finds into `model`; refuse a tower alone.

    Example:
        >>> fit_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 3), "bias": torch.ones(1)}, what="a.pt")
        Traceback (most recent call last):
        robustvlm.errors.UserError: a.pt does not fit the model: 'weight' is [1, 3], the model needs [1, 2]
    """
    found = find_weights(model, content, what=what, part=part)
    if found.tower is not None:
        raise TowerAlone(what, found.tower)
    model.load_state_dict(found.weights, strict=False)
    return found


class TowerAlone(UserError):
    """A checkpoint holds one tower, and nothing says where the other comes from."""

    def __init__(self, what: str, tower: str, *, spec: str = "FILE", base: str = "BASE") -> None:
        other = "text" if tower == "vision" else "vision"
        super().__init__(
            f"{what} holds a {tower} tower alone: name the model that it was made from, whose {other} tower it goes "
            f"with, as '{spec}@{base}'"
        )
        self.what, self.tower = what, tower


# Every way to read a file


def _readings(model: nn.Module, content: Mapping[str, Any], part: str | None, convert: Convert) -> Iterator[_Reading]:
    own = model.state_dict()
    for path, tensors in _groups(content):
        weights = {_bare(key): key for key in tensors}
        layout = from_transformers({name: tensors[key] for name, key in weights.items()})
        given = tensors if layout is None or len(weights) < len(tensors) else layout
        for tower, names in _targets(own).items():
            for prefix in _prefixes(given, names, always=tower is None):
                place = ".".join((*path, *prefix)) or "."
                if part is not None and place != part and not place.startswith(f"{part}."):
                    continue
                within = _named(part, path)
                yield _reading(model, own, given, prefix, names, tower, place, within=within, convert=convert)


def _named(part: str | None, path: tuple[str, ...]) -> tuple[str, ...]:
    """Return the prefix that the name of a part says beyond a dict: other modules than that are left aside."""
    place = ".".join(path)
    if part in (None, ".", place) or place.startswith(f"{part}."):
        return ()
    return tuple(str(part).removeprefix(f"{place}." if place else "").split("."))


def _groups(
    content: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every dict of a checkpoint that holds tensors by name, with the keys that lead to it."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in content.items() if len(path) < _DEEPEST else ():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _groups(value, (*path, key))


def _targets(own: Mapping[str, Tensor]) -> dict[str | None, dict[str, str]]:
    """Return, for the whole model and for each tower alone, the names that a file may use and the model's own."""
    vision = {name.removeprefix("visual."): name for name in own if name.startswith("visual.")}
    found: dict[str | None, dict[str, str]] = {None: {name: name for name in own}}
    if vision:
        text = {name.removeprefix("text."): name for name in own if name.startswith("text.")}
        common = ("logit_scale", "logit_bias")
        top = {name: name for name in own if not name.startswith("visual.") and name not in common}
        found |= {"vision": vision, "text": text or top}
    return {tower: {_bare(name): mine for name, mine in names.items()} for tower, names in found.items()}


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _TRANSPARENT)


def _prefixes(weights: Mapping[str, Tensor], names: Mapping[str, str], *, always: bool) -> list[tuple[str, ...]]:
    """Return the prefixes behind which a fair share of the names is found; none first."""
    counts: Counter[tuple[str, ...]] = Counter()
    for key in weights:
        parts = _bare(key).split(".")
        counts.update(tuple(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    found = [prefix for prefix, count in counts.items() if count >= _LEAST * len(names)]
    if always and () not in found:
        found.append(())
    return sorted(found, key=len)


def _reading(
    model: nn.Module,
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    prefix: tuple[str, ...],
    names: Mapping[str, str],
    tower: str | None,
    place: str,
    *,
    within: tuple[str, ...],
    convert: Convert,
) -> _Reading:
    taken: dict[str, tuple[str, Tensor]] = {}
    clashes, outside = [], []
    for key, tensor in given.items():
        parts = tuple(_bare(key).split("."))
        if parts[: len(prefix)] != prefix:
            if parts[: len(within)] == within and not _is_beside(key, tensor):
                outside.append(key)
            continue
        name = ".".join(parts[len(prefix) :])
        name = names.get(name, name)
        if name in taken and not _equal(taken[name][1], tensor):
            clashes.append(f"'{taken[name][0]}' and '{key}' are two different tensors for one weight")
        taken.setdefault(name, (key, tensor))
    weights = convert(model, {name: tensor for name, (_, tensor) in taken.items()})
    bias = None
    if "logit_bias" not in own and "logit_bias" in weights and weights["logit_bias"].numel() == 1:
        bias = float(weights.pop("logit_bias"))
    shapes = [
        f"'{name}' is {list(weights[name].shape)}, the model needs {list(own[name].shape)}"
        + _of_size(name, weights, own)
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    needed = own if tower is None else names.values()
    missing = [
        f"'{name}' is missing" for name in needed if name not in weights and not name.endswith("num_batches_tracked")
    ]
    # Of a tower's file, its temperature is taken too; a weight of the other tower is one too many.
    known = own.keys() if tower is None else {*names.values(), *(own.keys() & {"logit_scale"})}
    unknown = [
        f"'{name}' is not part of the model"
        for name, tensor in weights.items()
        if name not in known and not _is_beside(name, tensor)
    ]
    kept = {name: tensor for name, tensor in weights.items() if name in known}
    return _Reading(Found(kept, tower, place, bias), (clashes + shapes, missing, unknown), outside)


_CELL = 32
"""Pixels of an image, each way, to a cell of what a residual network of CLIP pools."""


def _of_size(name: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say what image size or text length position embeddings are of, where they differ in that from a model's."""
    if not name.endswith("positional_embedding") or weights[name].shape[1:] != own[name].shape[1:]:
        return ""
    count, needed, filters = len(weights[name]), len(own[name]), "visual.conv1.weight"
    if not name.startswith("visual."):
        if "text.cls_emb" in own:  # which takes a place of its own
            count, needed = count - 1, needed - 1
        return f" (texts of {count} tokens, not {needed}): name the architecture or config of that length"
    if filters not in weights or weights[filters].shape != own[filters].shape or count < 2:
        return ""
    patch = {"visual.positional_embedding": own[filters].shape[-1], "visual.attnpool.positional_embedding": _CELL}
    side = math.isqrt(count - 1)
    if name not in patch or side * side + 1 != count:
        return ""
    return f" (images of {side * patch[name]} pixels): name the architecture or config of that size"


def _is_beside(name: str, tensor: Tensor) -> bool:
    """Whether a tensor counts, masks or numbers something, and is no weight that was learnt."""
    return not tensor.is_floating_point() or name.rpartition(".")[2] == "attn_mask"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.float(), other.float()))


def _different(found: list[Found]) -> list[Found]:
    return [one for i, one in enumerate(found) if not any(_same(one, other) for other in found[:i])]


def _same(one: Found, other: Found) -> bool:
    return (
        one.tower == other.tower
        and one.weights.keys() == other.weights.keys()
        and all(_equal(tensor, other.weights[name]) for name, tensor in one.weights.items())
    )


def _misfit(reading: _Reading, what: str) -> str:
    faults = [fault for kind in reading.faults for fault in kind]
    if not faults:
        more = f" and {len(reading.outside) - 1} more" if len(reading.outside) > 1 else ""
        place = reading.found.place
        return (
            f"{what} holds weights beside the model, '{reading.outside[0]}'{more}: if the model is what stands under "
            f"'{place}' alone, say so as FILE#{place}"
        )
    more = f" ({reading.count - 2} more)" if reading.count > 2 else ""
    # Of each kind the first: a wrong architecture shows in all three.
    shown = [kind[0] for kind in reading.faults if kind][:2] if more else faults
    fits = "the model" if reading.found.tower is None else f"the model's {reading.found.tower} tower"
    return f"{what} does not fit {fits}: {'; '.join(shown)}{more}"

"""Which parameters of a vision tower are trained: `all`, `lora[:RANK]`, `ssf` or `last:N`; and merging them back."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustvlm.core.framing import trial_pixels
from robustvlm.core.seeds import generator
from robustvlm.errors import UserError, setting
from robustvlm.models import VLM

# Low-rank updates of a vision tower's matrices and filters (LoRA: Hu et al. 2022, arXiv 2106.09685)

_LORA_HOLDERS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
_NAMES = ("weight", "in_proj_weight")


class LowRank(nn.Module):
    """W + B A for a weight [O, ...] read as a matrix with O rows; B starts at zero, so the model starts unchanged.

    Example:
        >>> weight = torch.ones(4, 3)
        >>> torch.equal(LowRank(weight, rank=2, name="w")(weight), weight)
        True
    """

    def __init__(self, weight: Tensor, *, rank: int, name: str, seed: int = 0) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        rank = min(rank, rows, columns)
        draws = torch.rand(rank, columns, generator=generator(seed, "lora", name))
        self.down = nn.Parameter(((2 * draws - 1) / math.sqrt(columns)).to(weight))
        self.up = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(module: nn.Module, names: set[str], rank: int, *, seed: int = 0) -> int:
    """Give every matrix and filter among `names` a trainable update of at most `rank`; return how many have one."""
    found = [
        (part, attribute, f"{path}.{attribute}")
        for path, part in module.named_modules()
        if isinstance(part, _LORA_HOLDERS)
        for attribute in _NAMES
        if f"{path}.{attribute}" in names
    ]
    for part, attribute, name in found:
        weight = getattr(part, attribute)
        parametrize.register_parametrization(part, attribute, LowRank(weight.detach(), rank=rank, name=name, seed=seed))
    return len(found)


# Scaling and shifting of a vision tower's layers (SSF: Lian et al. 2022, arXiv 2210.08823)

_SSF_HOLDERS = (
    nn.Linear,
    nn.Conv2d,
    nn.MultiheadAttention,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)
_WEIGHTS, _BIASES = ("weight", "in_proj_weight"), ("bias", "in_proj_bias")


class Scale(nn.Module):
    """One trainable factor for every output of a layer, on its weight [O, ...]; 1 at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(len(weight)).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor.view(-1, *([1] * (weight.dim() - 1)))


class Shift(nn.Module):
    """One trainable offset for every output of a layer, on its bias [O]; 0 at the start."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(bias))

    def forward(self, bias: Tensor) -> Tensor:
        return bias + self.offset


def add_ssf(module: nn.Module, names: set[str]) -> int:
    """Let every layer whose parameters are among `names` scale and shift its outputs; return how many do.

    The published y = s * (W x + b) + t is the layer with weight s * W and bias s * b + t, which is reached by a factor
    on W and a free offset on b. Layers without a bias are scaled only.
    """
    count = 0
    for path, part in list(module.named_modules()):
        if not isinstance(part, _SSF_HOLDERS):
            continue
        for attribute in (*_WEIGHTS, *_BIASES):
            if f"{path}.{attribute}" in names:
                value = getattr(part, attribute).detach()
                change = Scale(value) if attribute in _WEIGHTS else Shift(value)
                parametrize.register_parametrization(part, attribute, change)
        count += parametrize.is_parametrized(part)
    return count


# Plain weights of a model whose weights are given by LoRA or SSF


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of `module` under the names it had before `make_trainable`, updates merged in.

    Example:
        >>> from robustvlm.models import load_model
        >>> from robustvlm.defenses.finetune.trainable import make_trainable
        >>> vlm = load_model("tiny")
        >>> before = vlm.state_dict()
        >>> make_trainable(vlm, "lora:2")
        >>> plain_state(vlm).keys() == before.keys()
        True
    """
    merged = {
        f"{path}.{name}" if path else name: getattr(part, name).detach()
        for path, part in module.named_modules()
        if parametrize.is_parametrized(part)
        for name in _parametrized(part)
    }
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        path, inside, rest = name.rpartition("parametrizations.")
        if not inside:
            state[name] = value
        elif rest.split(".")[1] == "original":
            plain = path + rest.split(".")[0]
            state[plain] = merged[plain]
    return state


def merge(module: nn.Module) -> None:
    """Replace LoRA and SSF by the weights that they amount to, in place; a module without them is left alone."""
    for part in list(module.modules()):
        if not parametrize.is_parametrized(part):
            continue
        merged = {name: getattr(part, name).detach().clone() for name in _parametrized(part)}
        # Not by remove_parametrizations, which takes the attributes from the class that copies of the module share.
        part.__class__ = parametrize.type_before_parametrizations(part)
        del part.parametrizations
        for name, value in merged.items():
            part.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _parametrized(part: nn.Module) -> list[str]:
    return [name for name, _ in part.get_submodule("parametrizations").named_children()]


# Which parameters of any model an image passes through, found by differentiation rather than by name


def vision_parameters(vlm: VLM) -> list[str]:
    """Return the names of the parameters that image features depend on: the vision tower with its projection.

    Raises UserError when there are none, as in a model that is no module or computes without gradients.

    Example:
        >>> from robustvlm.models import load_model
        >>> vision_parameters(load_model("tiny"))[0]
        'model.visual.conv1.weight'
    """
    names = _reached(vlm)
    if not names:
        raise UserError(
            f"'{vlm.spec}' has no parameters that its image features depend on: a model to be fine-tuned has to be a "
            "torch.nn.Module that computes them with gradients"
        )
    return names


def last_blocks(vlm: VLM, count: int) -> list[str]:
    """Return the names of the parameters of the last `count` blocks and of all that comes after them.

    A block is a module in a Sequential or ModuleList of nothing but composed modules, such as a transformer's layer or
    a ResNet's bottleneck. What comes after is what still has a gradient once the first of these blocks has its input
    cut off from the rest.

    Raises UserError when the vision tower has no such blocks, or fewer.
    """
    blocks = vision_blocks(vlm)
    if not blocks:
        raise UserError(
            f"the vision tower of '{vlm.spec}' has no blocks to count: train all of it ({setting('trainable', 'all')})"
        )
    if count > len(blocks):
        raise UserError(f"the vision tower of '{vlm.spec}' has {len(blocks)} blocks, got last:{count}")
    handle = blocks[-count].register_forward_pre_hook(_cut, with_kwargs=True)
    try:
        return _reached(vlm)
    finally:
        handle.remove()


def vision_blocks(vlm: VLM) -> list[nn.Module]:
    """Return the blocks of the vision tower, the first one first; a block within a block does not count."""
    vision = set(vision_parameters(vlm))
    found: dict[str, nn.Module] = {}
    for path, module in vlm.named_modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList)) or any(path.startswith(f"{b}.") for b in found):
            continue
        children = {
            name: child for name, child in module.named_children() if next(child.parameters(), None) is not None
        }
        if any(type(child).__module__.startswith("torch.nn") for child in children.values()):
            continue
        prefix = f"{path}." if path else ""
        found |= {
            prefix + name: child
            for name, child in children.items()
            if any(f"{prefix}{name}.{inner}" in vision for inner, _ in child.named_parameters())
        }
    return list(found.values())


def vision_module(vlm: VLM) -> nn.Module:
    """Return the smallest module that holds all parameters of the vision tower."""
    paths = [name.split(".")[:-1] for name in vision_parameters(vlm)]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return vlm.get_submodule(".".join(parts[0] for parts in shared))


def _cut(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    del module
    cut = [a.detach() if isinstance(a, Tensor) else a for a in args]
    return tuple(cut), {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}


def _reached(vlm: VLM) -> list[str]:
    """Return the names of the parameters that have a gradient in the features of one image."""
    parameters = {name: p for name, p in vlm.named_parameters() if p.is_floating_point()}
    pixels = trial_pixels(1, vlm.image_size, device=vlm.device)
    with _differentiable(list(parameters.values())), torch.enable_grad():
        features = vlm.embed_image(pixels)
        if not parameters or not features.requires_grad:
            return []
        grads = torch.autograd.grad(features.float().sum(), list(parameters.values()), allow_unused=True)
    return [name for name, grad in zip(parameters, grads, strict=True) if grad is not None]


@contextmanager
def _differentiable(parameters: list[nn.Parameter]) -> Iterator[None]:
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


# Which parameters of a vision tower are trained: `all`, `lora[:RANK]`, `ssf` or `last:N`

DEFAULT_RANK = 8
_FORM = re.compile(r"(all|ssf)|(lora)(?::(\d{1,4}))?|(last):(\d{1,4})")


def parse_trainable(text: str) -> tuple[str, int]:
    """Return the kind of a subset and its number (LoRA's rank, how many blocks; 0 where there is none).

    Raises UserError for anything but `all`, `lora`, `lora:RANK`, `ssf` and `last:N`.

    Example:
        >>> parse_trainable("lora"), parse_trainable("last:2")
        (('lora', 8), ('last', 2))
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{setting('trainable')} must be all, lora, lora:RANK, ssf or last:N, got '{text}'")
    whole, lora, rank, last, blocks = found.groups()
    kind, number = whole or lora or last, int(rank or blocks or (DEFAULT_RANK if lora else 0))
    if kind in ("lora", "last") and number < 1:
        raise UserError(f"the number in '{text}' must be at least 1")
    return kind, number


def require_trainable(vlm: VLM, text: str) -> None:
    """Change nothing; raise UserError for an unknown subset of the vision tower, or one that this model lacks."""
    kind, number = parse_trainable(text)
    if kind == "last":
        last_blocks(vlm, number)
    else:
        vision_parameters(vlm)


def make_trainable(vlm: VLM, text: str, *, seed: int = 0) -> None:
    """Let the parameters of a subset of the vision tower require gradients, all others not; the function is unchanged.

    LoRA and SSF add parameters to the model (see `merge` and `plain_state` for the way back).

    Raises UserError for an unknown subset, or one that this model does not have.
    """
    kind, number = parse_trainable(text)
    names = last_blocks(vlm, number) if kind == "last" else vision_parameters(vlm)
    vlm.requires_grad_(False)
    if kind in ("all", "last"):
        parameters = dict(vlm.named_parameters())
        for name in names:
            parameters[name].requires_grad_(True)
        return
    changed = add_lora(vlm, set(names), number, seed=seed) if kind == "lora" else add_ssf(vlm, set(names))
    if not changed:
        raise UserError(f"the vision tower of '{vlm.spec}' has no linear or convolutional layers for {kind}: pass all")

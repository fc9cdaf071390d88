"""Where this program hands pixels to a user's code, and how it borrows a caller's module."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from robustvlm.core.object_graph import Reached
from robustvlm.core.user_code import no_exit
from robustvlm.errors import UserError

# Where this program hands pixels to a user's code: nothing it does to them, or to the process, comes back in

HALF = (torch.float16, torch.bfloat16)


class Boundary:
    """Calls a user's function of pixels [B, 3, H, W] and returns its rows [B, D] in float32 (float64 for such pixels).

    * The function gets a copy, so that one that normalises in place works as one that does not; what it returns is a
      copy too, which it cannot change afterwards.
    * Gradients pass it scaled, row by row, to a size that half precision can hold, and are scaled back behind it. All
      factors are powers of two and rows do not interact, so that in float32 not a bit changes; in float16 what would
      have been rounded to zero is not (loss scaling, Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). Where
      weights are being trained, or gradients differentiated (`unscaled_gradients`), nothing is scaled.
    * Settings of the process that the function changes are put back (`same_process`).

    Args:
        call: the function; what: how errors name it, as "encode_image of 'my:encoder'".
        parts: the module that it runs, if it is one: its parameters say in which precision, and whether they train.

    Example:
        >>> weight = torch.full((12, 2), 1e-4)
        >>> ask = Boundary(lambda x: (x.sub_(0.5).flatten(1).half() @ weight.half()), what="my:model")
        >>> pixels = torch.rand(1, 3, 2, 2, requires_grad=True)
        >>> (grad,) = torch.autograd.grad(1e-6 * ask(pixels)[:, 0].sum(), pixels)
        >>> torch.allclose(grad, torch.tensor(1e-10), rtol=1e-2), ask.in_half
        (True, True)
    """

    def __init__(self, call: Callable[[Tensor], Any], *, what: str, parts: Any = None) -> None:
        self.call, self.what = call, what
        self._parts = parts if isinstance(parts, nn.Module) else nn.Module()
        kinds = {parameter.dtype for parameter in self._parts.parameters() if parameter.is_floating_point()}
        self.in_half = bool(kinds & set(HALF))
        # A module all in half precision may leave it to its caller to hand over such pixels; see `settle`.
        self._dtype: torch.dtype | None = None
        self._other = kinds.pop() if len(kinds) == 1 and self.in_half else None
        self._seeds = False

    def settle(self, pixels: Tensor) -> Tensor:
        """Try the function out on pixels: which dtype it takes, and whether it seeds the process's random draws."""
        try:
            output = self(pixels)
        except RuntimeError:
            if self._other is None:
                raise
            self._dtype = self._other
            output = self(pixels)
        states = []
        for seed in (1, 2):
            with torch.random.fork_rng(devices=_devices(pixels)):
                torch.manual_seed(seed)
                self(pixels)
                states.append(torch.random.get_rng_state())
        # Two streams that differ before and agree behind it: noise drawn around it would be the same in every pass.
        self._seeds = torch.equal(*states)
        return output

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the rows of a batch.

        Raises:
            UserError: the output is no tensor of one row for each image, or has no gradient where one is needed.
        """
        wants_gradient = torch.is_grad_enabled() and pixels.requires_grad
        if torch.compiler.is_compiling():  # which sees through neither of the functions below
            return self._checked(self.call(pixels.clone()), len(pixels), wants_gradient).to(pixels.dtype, copy=True)
        # Weights that are being trained would meet the factors, which only pixels are freed of.
        scales = wants_gradient and not _unscaled.get()
        scales = scales and not any(parameter.requires_grad for parameter in self._parts.parameters())
        scale = _Scale()
        given = _Behind.apply(pixels, scale) if scales else pixels.clone()
        if self._dtype is not None:
            given = given.to(self._dtype)
        kept = torch.random.fork_rng(devices=_devices(pixels)) if self._seeds else contextlib.nullcontext()
        with same_process(), kept, no_exit(self.what):
            output = self.call(given)
        rows = self._checked(output, len(pixels), wants_gradient)
        self.in_half = self.in_half or rows.dtype in HALF
        wide = torch.float64 if pixels.dtype == torch.float64 else torch.float32
        if not scales:
            return rows.to(wide, copy=True, memory_format=torch.contiguous_format)
        widened: Tensor = _Before.apply(rows, scale, wide)
        return widened

    def _checked(self, output: Any, rows: int, wants_gradient: bool) -> Tensor:
        wanted = f"{self.what} must return a tensor of {rows} rows for {rows} images"
        if not isinstance(output, Tensor):
            raise UserError(f"{wanted}, got a {type(output).__name__}")
        if output.ndim != 2 or len(output) != rows or not output.is_floating_point():
            raise UserError(f"{wanted}, got {output.dtype} {list(output.shape)}")
        if wants_gradient and not output.requires_grad:
            raise UserError(
                f"{self.what} has no gradient, which gradient attacks need: leave out no_grad, inference_mode, detach "
                "and numpy in it, or set differentiable = False on it (docs/attacks.md, parts without gradient)"
            )
        return output


_unscaled: ContextVar[bool] = ContextVar("unscaled", default=False)


@contextlib.contextmanager
def unscaled_gradients() -> Iterator[None]:
    """Let gradients pass every boundary as they are, for passes whose gradient is to be differentiated again.

    The factor of the second way back would be taken out of what the first way back left inside, which never got it.
    """
    token = _unscaled.set(True)
    try:
        yield
    finally:
        _unscaled.reset(token)


class _Scale:
    """The factor of every row on its way back through one call."""

    factor: Tensor | None = None


class _Before(torch.autograd.Function):
    """Widens rows to float32; on the way back, scales the gradient of every row to a size near one and narrows it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: _Scale, wide: torch.dtype) -> Tensor:
        ctx.scale, ctx.dtype = scale, rows.dtype
        return rows.to(wide, copy=True, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        factor = _power_of_two_near_inverse(grad.detach().abs().amax(1))
        ctx.scale.factor = factor
        return (grad * factor[:, None]).to(ctx.dtype), None, None


class _Behind(torch.autograd.Function):
    """Copies pixels; on the way back, takes the factor of `_Before` out of their gradient."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return pixels.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, factor = grads[0], ctx.scale.factor
        if factor is None:
            return grad, None
        return grad / factor.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1)), None


def _power_of_two_near_inverse(size: Tensor) -> Tensor:
    """Return powers of two that bring sizes [B] to between 4 and 8, to the bit; 1 for what is zero or not finite.

    Example:
        >>> _power_of_two_near_inverse(torch.tensor([1.0, 3e-9, 0.0, float("inf")])).log2().tolist()
        [2.0, 31.0, 0.0, 0.0]
    """
    size = size.float()
    exponent = (size.view(torch.int32) >> 23) - 127
    # The exponent's bits themselves: a library's power or logarithm may be off in the last place.
    found = (((2 - exponent).clamp(-120, 120) + 127) << 23).view(torch.float32)
    return torch.where(size.isfinite() & (size > 0), found, torch.ones_like(size))


def in_own_precision(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion of a module's tensors that leaves half precision what it is."""

    def converted(tensor: Tensor) -> Tensor:
        found = convert(tensor)
        return found.to(tensor.dtype) if tensor.dtype in HALF and found.dtype not in HALF else found

    return converted


def _devices(pixels: Tensor) -> list[torch.device]:
    return [pixels.device] if pixels.device.type == "cuda" else []


# A caller's module, used as it must be for an evaluation and given back as it was

Thing = TypeVar("Thing")
Module = TypeVar("Module", bound=nn.Module)


@contextlib.contextmanager
def borrowed(module: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """Put a module into evaluation mode with frozen weights, and every part and weight back as it was, error or not.

    Gradients with regard to inputs pass frozen weights; none is left in their `.grad`. Without `frozen` only modes are
    switched, so that what was made inside can be trained on.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
        >>> with borrowed(model):
        ...     print(model.training, model[0].weight.requires_grad)
        False False
        >>> model.training, model[1].training, model[0].weight.requires_grad
        (True, False, True)
    """
    # The flags themselves, not train() and eval(): these may do more, and know one mode for all parts.
    training = [part for part in module.modules() if part.training]
    trainable = [parameter for parameter in module.parameters() if frozen and parameter.requires_grad]
    try:
        for part in training:
            part.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for part in training:
            part.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def placed(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """Return a module itself if all of it is on `device` in `dtype` already, else a copy that is.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> placed(model, torch.device("cpu"), torch.float32) is model
        True
        >>> placed(model, torch.device("cpu"), torch.float64).weight.dtype, model.weight.dtype
        (torch.float64, torch.float32)
    """
    place = torch.empty(0, device=device).device
    tensors = (tensor for tensors in (module.parameters(), module.buffers()) for tensor in tensors)
    if all(t.device == place and (not t.is_floating_point() or t.dtype == dtype) for t in tensors):
        return module
    return copy.deepcopy(module).to(device=place, dtype=dtype)


def own_copy(thing: Thing) -> Thing:
    """Return a copy of a user's module to freeze and move at will, the module itself where it cannot be copied.

    A copy that still runs parts of the original (a patched `forward`, a function that holds on to them: Python copies
    no functions) is none: these parts would keep their training mode and their device. Objects that are no modules are
    not switched or frozen, and stay what they are.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> own_copy(net) is net
        False
        >>> net.forward = lambda x: nn.functional.linear(x, net.weight)
        >>> own_copy(net) is net
        True
    """
    if not isinstance(thing, nn.Module):
        return thing
    try:
        found = copy.deepcopy(thing)
        return thing if _leads_back(found, thing) else found
    except Exception:  # locks, handles, tensors of a graph: anything may stand in a user's object
        return thing


def _leads_back(found: nn.Module, original: nn.Module) -> bool:
    """Whether what the parts of a copy hold leads to a part of the original that was to be copied."""
    own, copied = (
        {id(part) for parts in (one.modules(), one.parameters(), one.buffers()) for part in parts}
        for one in (original, found)
    )
    names = vars(nn.Module()).keys()
    held = [value for part in found.modules() for name, value in vars(part).items() if name not in names]
    reached = Reached(held, private=True)
    modules = (part for module in reached.modules.values() for part in module.modules())
    return any(id(part) in own - copied for parts in (modules, reached.tensors.values()) for part in parts)


@contextlib.contextmanager
def same_process() -> Iterator[None]:
    """Put back what a user's code may change for the whole process: gradient mode, dtype, determinism, threads."""
    cudnn = torch.backends.cudnn
    grad, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    exact, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags = (cudnn.deterministic, cudnn.benchmark)
    try:
        yield
    finally:
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) != (
            exact,
            warn,
        ):
            torch.use_deterministic_algorithms(exact, warn_only=warn)
        if (cudnn.deterministic, cudnn.benchmark) != flags:
            cudnn.deterministic, cudnn.benchmark = flags


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Put the random states of torch, NumPy and Python back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)

"""A GPU that is not there: tensors with the CPU's numbers that know where they live, and a host that counts its waits.

Between `pretend()` and the end of the process, "cuda:0" is a device like any other. What a GPU refuses is refused:
operations on tensors of both devices, and NumPy on one of the GPU. What makes the host wait there is counted: numbers
fetched (`item`, `tolist`, `bool`, copies to the CPU), sizes that follow from values (`nonzero`, boolean masks), copies
to the GPU that do not say `non_blocking`, and `synchronize`. It says nothing of speed, memory, streams, the numerics
of CUDA kernels, autocast or `torch.compile`. It patches torch, so use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")

# Operations whose result has a size, or a truth, that the host must know before it goes on.
_ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_COPIES = {"_to_copy", "copy_"}
_LOOKUPS = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits:
    """How often the host waited for the GPU, by what made it wait and by the line of the program that did."""

    def __init__(self) -> None:
        self.by_line: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_line.total()

    def add(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and "/robustvlm/" not in frame.f_code.co_filename.replace("\\", "/"):
            frame = frame.f_back
        file = frame.f_code.co_filename.replace("\\", "/").rsplit("/robustvlm/", 1)[-1]
        self.by_line[f"{what} at {file}:{frame.f_lineno}"] += 1

    @contextlib.contextmanager
    def inside(self) -> Iterator[Counter[str]]:
        """Give a counter that holds the waits of the block once it has ended."""
        before, found = self.by_line.copy(), Counter[str]()
        yield found
        found.update(self.by_line - before)


waits = Waits()


class OnGpu(torch.Tensor):
    """A tensor of the GPU; `values` has its numbers. C++ takes it for a meta tensor, and so makes no CUDA call."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
            requires_grad=values.requires_grad,
        )
        made.values = values
        return made

    device = property(lambda _: GPU)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)
    is_meta = property(lambda _: False)

    def __repr__(self, **_: object) -> str:
        return f"OnGpu({self.values!r})"

    def tolist(self) -> Any:
        waits.add("tolist")
        return self.values.detach().tolist()

    def numpy(self, *_: object, **__: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: copy it to the host memory first")

    def __array__(self, *_: object, **__: object) -> Any:
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Also sees what is made from no tensor, such as `torch.zeros(3, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, OnGpu) for tensor in tensors)
    if there and name not in _COPIES:
        _require_one_place(name, args, tensors)
    goes_there = there
    if kwargs.get("device") is not None:  # C++ calls the device of a tensor of the GPU "meta"
        goes_there = torch.device(kwargs["device"]).type in ("cuda", "meta")
        kwargs = kwargs | {"device": CPU}
    elif name == "copy_":
        goes_there = isinstance(args[0], OnGpu)
    _count(name, args, kwargs, there, goes_there)
    kwargs.pop("pin_memory", None)
    out = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if not goes_there:
        return out
    if args and isinstance(args[0], OnGpu) and out is args[0].values:  # in place
        return args[0]
    return tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, torch.Tensor) else leaf, out)


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, OnGpu) else leaf


def _require_one_place(name: str, args: Any, tensors: list[torch.Tensor]) -> None:
    """Refuse what torch refuses: single numbers of the CPU meet tensors of the GPU, and no other pairs do."""
    if name in _LOOKUPS:
        looked_up, places = args[0], [place for place in args[1] if isinstance(place, torch.Tensor)]
        if not isinstance(looked_up, OnGpu) and any(isinstance(place, OnGpu) for place in places):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [looked_up, *args[2:3]]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    if strangers and any(isinstance(tensor, OnGpu) for tensor in tensors):
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]
        raise RuntimeError(f"expected all tensors to be on the same device, but {name} got {shapes}")


def _count(name: str, args: Any, kwargs: dict[str, Any], there: bool, goes_there: bool) -> None:
    if name in _COPIES:
        source = args[0] if name == "_to_copy" else args[1]
        free = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if isinstance(source, OnGpu) != goes_there and not free:
            waits.add("copy to the GPU" if goes_there else "copy to the CPU")
    elif there and name in _ASKS:
        waits.add(name)
    elif there and name in _LOOKUPS:
        places = [place for place in args[1] if isinstance(place, torch.Tensor)]
        if any(place.dtype in (torch.bool, torch.uint8) for place in places):
            waits.add("boolean mask")
        elif any(not isinstance(place, OnGpu) and place.dim() for place in places):
            waits.add("index from the CPU")
    elif there and name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits.add(name)


# torch as it is with a GPU


class _Event:
    """An event of a stream on which everything is done as soon as it is asked for."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits.add("event")

    def elapsed_time(self, end: _Event) -> float:
        assert (self.timed, end.timed) == (True, True), "both events must have been made with enable_timing"
        return 1000 * (end.at - self.at)


class _Stream:
    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        waits.add("stream")


def pretend() -> None:
    """Let torch have one GPU from now on. Import before whatever looks at torch while it is imported."""
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available, cuda.is_initialized, cuda.device_count = lambda: True, lambda: True, lambda: 1
    cuda.get_device_name = lambda *_: "simulated GPU"
    cuda.set_device = cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *_: 0
    cuda.mem_get_info = lambda *_: (8 * 2**30, 8 * 2**30)
    cuda.synchronize = lambda *_: waits.add("synchronize")
    cuda.Event, cuda.current_stream = _Event, lambda *_: _Stream()
    cuda.is_current_stream_capturing = lambda: False
    if hasattr(torch, "accelerator"):
        torch.accelerator.current_stream = lambda *_: _Stream()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    _pretend_draws()
    _pretend_tensors()
    autocast = torch.autocast

    class Autocast(autocast):
        def __init__(self, _: str, dtype: Any = None, *given: Any, **options: Any) -> None:
            super().__init__("cpu", dtype or torch.bfloat16, *given, **options)

    torch.autocast = Autocast
    _Everywhere().__enter__()


def _pretend_draws() -> None:
    """The GPU draws from the CPU's streams: its numbers are those of the CPU."""
    fork, generator, default = torch.random.fork_rng, torch.Generator, torch.default_generator

    def seed(number: int) -> Any:
        return default.manual_seed(int(number))

    torch.random.fork_rng = lambda *_, **more: fork(**(more | {"devices": []}))
    torch.manual_seed = torch.random.manual_seed = seed
    torch.Generator = lambda *_, **__: generator()
    torch.cuda.get_rng_state = lambda *_: default.get_state()
    torch.cuda.set_rng_state = lambda state, *_: default.set_state(state)


def _pretend_tensors() -> None:
    """What makes tensors from numbers asks CUDA itself for a place, past everything that can be watched."""

    def placed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> torch.Tensor:
            if isinstance(data, OnGpu) and make is not torch.Tensor.new_tensor:
                return data.to(device or GPU, dtype or data.dtype)
            found = make(data, dtype=dtype, **{key: value for key, value in more.items() if key != "pin_memory"})
            return found.to(GPU) if device is not None and torch.device(device).type == "cuda" else found

        return made

    new = torch.Tensor.new_tensor
    torch.tensor, torch.as_tensor = placed(torch.tensor), placed(torch.as_tensor)

    def new_tensor(
        self: torch.Tensor, data: Any, *, dtype: Any = None, device: Any = None, **more: Any
    ) -> torch.Tensor:
        if not isinstance(self, OnGpu):
            return new(self, data, dtype=dtype, device=device, **more)
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or GPU, **more)

    torch.Tensor.new_tensor = new_tensor

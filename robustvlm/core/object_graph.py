"""All that a user's object can reach and that decides what it answers: networks, tensors, settings, source files.

A network may stand in a closure, a default argument or a list, where `torch` does not look for it: its weights would
not count, and it would stay in training mode and on the CPU.
"""

import functools
import hashlib
import inspect
import re
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OURS = Path(__file__).parents[2]
_LIBRARIES = ("site-packages", "dist-packages")
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
_GLOBALS = (nn.Module, Tensor, np.ndarray, int, float, str, dict, list, tuple)
_TORCHS = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def fingerprint(state: Mapping[str, object], extra: Iterable[str] = ()) -> str:
    """Return a 32-digit hex BLAKE2b digest of names, shapes, dtypes and bytes of `state`, and of the texts in `extra`.

    The order of the entries, the device and the memory layout do not matter; every value does. Entries that are no
    tensors count by their `repr`.

    Example:
        >>> a = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
        >>> fingerprint(a) == fingerprint({"b": torch.zeros(2), "w": torch.ones(3, 2).T})
        True
        >>> fingerprint(a) == fingerprint({"b": torch.zeros(2), "w": torch.ones(3, 2)})
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if isinstance(value, torch.Tensor):
            _add(digest, f"{name} {value.dtype} {tuple(value.shape)}".encode())
            _add(digest, _raw(value))
        else:
            _add(digest, f"{name} {value!r}".encode())
    for text in extra:
        _add(digest, text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _add(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    # The length goes first, so that no two lists of parts are the same stream of bytes.
    digest.update(len(part).to_bytes(8, "big"))
    digest.update(part)


class Reached:
    """What can be reached from an object, found when this is made.

    Functions are followed into closures, default arguments and the globals they name, if these are networks, tensors,
    plain values, containers, or functions and objects of the user's; containers and the user's objects into all they
    hold, those of libraries as far as they hold networks and tensors.

    Args:
        methods: names of the methods whose closures and globals count; private: so do private attributes of networks.

    Attributes:
        modules: networks by how they are reached; those inside one of them are not listed again.
        tensors: tensors outside networks. arrays: of numpy.
        facts: plain values and where they stand, source files by digest.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> Reached(lambda x: net(x)).modules
        {'/net': Linear(in_features=2, out_features=2, bias=True)}
    """

    def __init__(
        self, thing: object, *, methods: tuple[str, ...] = ("__call__", "forward"), private: bool = False
    ) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._method_names, self._private = methods, private
        self._values: set[str] = set()
        self._seen: dict[int, object] = {}  # the objects are kept, for an id may be given again
        self._walk(thing, "")
        self._seen = {}

    @property
    def facts(self) -> tuple[str, ...]:
        """Plain values and source files, in a fixed order."""
        return tuple(sorted(self._values))

    def state(self) -> dict[str, object]:
        """Return all weights and tensors by name, as they are now."""
        found: dict[str, object] = dict(self.tensors)
        for path, module in self.modules.items():
            found.update({f"{path}.{name}": tensor for name, tensor in module.state_dict().items()})
        return found

    def _walk(self, thing: object, path: str) -> None:
        if isinstance(thing, _PLAIN):
            if not (isinstance(thing, str) and _DEVICE.fullmatch(thing)):
                self._values.add(f"{path}={thing!r}")
            return
        if isinstance(thing, type | types.ModuleType) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self.tensors[path] = thing
        elif isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
            self.arrays[path] = thing
            digest = hashlib.blake2b(thing.tobytes(), digest_size=16).hexdigest()
            self._values.add(f"{path}={thing.dtype}{thing.shape}{digest}")
        elif isinstance(thing, nn.Module):
            self._module(thing, path)
        else:
            self._object(thing, path)

    def _object(self, thing: Any, path: str) -> None:
        if isinstance(thing, types.FunctionType):
            self._function(thing, path)
        elif isinstance(thing, types.MethodType):
            self._walk(thing.__self__, f"{path}/self")
            self._walk(thing.__func__, path)
        elif isinstance(thing, functools.partial):
            self._walk((thing.func, thing.args, thing.keywords), path)
        elif isinstance(thing, dict):
            for key, value in thing.items():
                self._walk(value, f"{path}/{key}")
        elif isinstance(thing, list | tuple):
            for number, value in enumerate(thing):
                self._walk(value, f"{path}/{number}")
        else:
            self._methods(type(thing), path)
            # What a library's object is made of (a logger knows all others) is no part of the denoiser, beyond weights.
            whole = isinstance(thing, types.SimpleNamespace) or not _is_library(type(thing))
            for name, value in getattr(thing, "__dict__", {}).items():
                if whole or isinstance(value, nn.Module | Tensor | np.ndarray):
                    self._walk(value, f"{path}/{name}")

    def _module(self, module: nn.Module, path: str) -> None:
        self.modules[path] = module
        for inner, part in module.named_modules():
            self._seen[id(part)] = part
            here = f"{path}/{inner}" if inner else path
            # Not part of the state dict; what is computed later is no part of what the object is.
            hidden = {name: part._buffers[name] for name in sorted(part._non_persistent_buffers_set)}
            if hidden:
                self._values.add(f"{here} buffers {fingerprint(hidden)}")
            if not _is_library(type(part)):
                self._methods(type(part), here)
                for name, value in vars(part).items():
                    skipped = name in _TORCHS if self._private else name.startswith("_")
                    if not skipped and name != "training":
                        self._walk(value, f"{here}/{name}")

    def _methods(self, kind: type, path: str) -> None:
        if _is_library(kind):
            return
        self._values.add(f"{path} is a {kind.__qualname__}{_digest_of(kind)}")
        if _OURS in (_file(kind) or Path()).parents:  # how our code is cut into functions is no part of what it does
            return
        for name in self._method_names:
            method = getattr(kind, name, None)
            if isinstance(method, types.FunctionType) and not _is_library(method):
                self._function(method, path)

    def _function(self, function: types.FunctionType, path: str) -> None:
        self._values.add(f"{path} is {function.__qualname__}{_digest_of(function)}")
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            try:
                self._walk(cell.cell_contents, f"{path}/{name}")
            except ValueError:  # not filled yet
                continue
        self._walk([function.__defaults__, function.__kwdefaults__], f"{path}/defaults")
        for name in sorted(set(_names(function.__code__))):
            value = function.__globals__.get(name)
            if isinstance(value, _GLOBALS) or (value is not None and _is_users(value)):
                self._walk(value, f"{path}/{name}")


def _is_users(thing: object) -> bool:
    """Whether a function, or the class of an object, stands in a file of the user's."""
    kind = thing if isinstance(thing, types.FunctionType) else type(thing)
    return not _is_library(kind) and _OURS not in (_file(kind) or Path()).parents


def _digest_of(kind: Callable[..., Any] | type) -> str:
    """Return the digest of the user's file that a class or function stands in; nothing for ours and libraries."""
    file = _file(kind)
    return "" if file is None or _is_library(kind) or _OURS in file.parents else f" of {_digest(file)}"


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() if file.is_file() else ""


def _is_library(kind: Callable[..., Any] | type) -> bool:
    """Whether a class or function belongs to Python or an installed package, whose settings vary between versions."""
    file = _file(kind)
    if file is None or _OURS in file.parents:
        return file is None and kind.__module__ != "__main__"
    return any(name in file.parts for name in _LIBRARIES) or Path(sysconfig.get_paths()["stdlib"]) in file.parents


def _file(kind: Callable[..., Any] | type) -> Path | None:
    try:
        file = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # written in C, or typed in
        return None
    return Path(file) if file else None


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code and the functions in it may look up among its globals."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)

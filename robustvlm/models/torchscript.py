"""The tensors of a TorchScript archive, as OpenAI publishes CLIP, taken from its records; its code is not read."""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from robustvlm.errors import UserError

_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_archive(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an archive by the names of its state dict; nothing in it is run, imported or compiled.

    Raises:
        UserError: the archive is damaged, or holds what no module of tensors holds.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.pt"
        >>> torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), file)
        >>> sorted(read_archive(file))
        ['bias', 'weight']
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            found = _Reader(archive, root.partition("/")[0]).load()
            return dict(_tensors(found, ""))
    except Exception as error:  # broken bytes fail in any way
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"'{path}' is a TorchScript archive that cannot be read without running it ({said}): where you trust it, "
            "load it with torch.jit.load and save its state_dict() as .safetensors"
        ) from error


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which torch before 2.6 would compile when asked for its tensors.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "plain.pt"
        >>> torch.save({"a": torch.ones(1)}, file)
        >>> is_archive(file)
        False
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


class _Node:
    """A module of the archive: its attributes, and nothing that they do."""

    def __init__(self, *given: object) -> None:
        del given

    def __setstate__(self, state: object) -> None:
        self.parts = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Knows modules as `_Node`, and how a tensor lies in its record; any other name is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_record(archive, f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._records: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Node
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        raise ValueError(f"it calls {module}.{name}")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, *_ = pid
        if key not in self._records:
            record = bytearray(_record(self._archive, f"{self._root}/data/{key}"))
            self._records[key] = torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)
        return self._records[key]


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    # As torch writes them; what is compressed could unpack to any size.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("its records are compressed")
    return archive.read(name)


def _rebuilt(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    # as_strided checks that the view stays within the record.
    return storage.as_strided(size, stride, offset)


def _tensors(node: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in (node.parts if isinstance(node, _Node) else {}).items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Node):
            yield from _tensors(value, f"{prefix}{name}.")

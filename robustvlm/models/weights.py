"""Weights: fetched from a hub, and read from a file, TorchScript archives too, without running code from it."""

import contextlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from robustvlm.core.files import require_regular
from robustvlm.core.network import download_seconds, within
from robustvlm.errors import UserError, setting
from robustvlm.text import without_secrets

# Reading checkpoints without running code from them

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")

# What training scripts keep beside the weights without a thought: read as nothing, and without any code of theirs.
_ASIDE = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "argparse.Namespace",
)


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Return what a checkpoint file holds, tensors on the CPU; nothing but tensors is ever unpickled.

    NumPy numbers and parsed options beside the weights, as training scripts store them, come out as empty objects. Of a
    TorchScript archive the tensors are returned under the names of its state dict; its code is not read.

    Raises:
        UserError: the file is missing, damaged, holds code, or is no mapping.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "w.pth.tar"
        >>> torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(1)}}, file)
        >>> read_checkpoint(file)
        {'epoch': 3, 'state_dict': {'module.a': tensor([1.])}}
    """
    if not path.is_file():
        raise UserError(f"no checkpoint file at '{path}'")
    if path.suffix not in SUFFIXES:
        raise UserError(f"a checkpoint file ends in {', '.join(SUFFIXES)}, got '{path.name}'")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled_tensors(path)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"'{path}' holds no named tensors but {type(content).__name__}: save model.state_dict()")
    return content


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the named tensors of a file that holds nothing else, on the CPU.

    Raises UserError as `read_checkpoint`, and for anything but finite tensors.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "w.pt"
        >>> torch.save({"a": torch.ones(1)}, file)
        >>> read_weights(file)
        {'a': tensor([1.])}
    """
    weights = dict(read_checkpoint(path))
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"'{path}' holds more than tensors: '{name}' is a {type(tensor).__name__}")
    require_finite(weights, f"'{path}'")
    return weights


def stored_weights(state: Mapping[str, torch.Tensor], *, half: bool = False) -> dict[str, torch.Tensor]:
    """Return weights as they are written: on the CPU, each with memory of its own, with 16 bits if `half`.

    Those that need no change are not copied: a large model would be in memory twice. UserError for values beyond
    65,504, which 16 bits would make infinite.

    Example:
        >>> whole = torch.zeros(4)
        >>> found = stored_weights({"a": whole, "b": whole[:2]})
        >>> found["a"].data_ptr() == whole.data_ptr(), found["b"].data_ptr() == whole.data_ptr()
        (True, False)
    """
    found: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, given in state.items():
        tensor = (_halved(name, given) if half and given.is_floating_point() else given).detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def require_half(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights of which 16 bits cannot hold one.

    Example:
        >>> require_half({"a": torch.tensor([65504.0])})
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            _halved(name, tensor)


def _halved(name: str, given: torch.Tensor) -> torch.Tensor:
    found = given.half()
    if not torch.equal(found.isfinite(), given.isfinite()):
        largest = given.flatten()[given.nan_to_num(0, 0, 0).abs().argmax()].item()
        raise UserError(
            f"'{name}' holds a value of {largest:g}, which 16 bits would make infinite: leave out {setting('half')}"
        )
    return found


def require_finite(weights: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse weights of which one is no number.

    Example:
        >>> require_finite({"a": torch.ones(1)}, "a.pt")
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{what} is broken: '{name}' holds NaN or infinite values")


def _read_safetensors(path: Path) -> object:
    try:
        require_regular(path)
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{path}' is damaged or no safetensors file ({error}): fetch or save it again") from error


def _read_pickled_tensors(path: Path) -> object:
    if is_archive(path):
        return read_archive(path)
    try:
        with warnings.catch_warnings(), _aside():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Since torch 2.4 the message names a global, before a class.
        blocked = re.search(r"(?:GLOBAL:?|Unsupported class) (?:'|`)?([\w.]+)", str(error))
        if blocked:
            what = f"'{path}' would run code when loaded (it calls {blocked[1]}) and is refused"
            raise UserError(f"{what}: save its state dict as .safetensors") from error
        raise UserError(_damaged(path)) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError ... depending on where the bytes break
        raise UserError(_damaged(path)) from error


class _Aside:
    """Stands for an object beside the weights; whatever it was made from is dropped."""

    def __init__(self, *given: object, **options: object) -> None:
        del given, options

    def __setstate__(self, state: object) -> None:
        del state


def _aside() -> contextlib.AbstractContextManager[None]:
    """Let the loader of plain tensors put stand-ins where a file names what `_ASIDE` lists."""
    # Stand-ins came to torch with this function.
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return contextlib.nullcontext()
    allowed: contextlib.AbstractContextManager[None] = torch.serialization.safe_globals(
        [(_Aside, name) for name in _ASIDE]
    )
    return allowed


def _damaged(path: Path) -> str:
    return f"'{path}' is damaged or no torch checkpoint of plain tensors: fetch it again or save it as .safetensors"


# Fetching checkpoints from the Hugging Face hub, cached copies first, with one clear error where that fails

CONFIG_NAME = "open_clip_config.json"
_SHORT = 30.0  # seconds for one question to the hub
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


def hub_file(repo: str, names: Sequence[str], *, advice: str) -> Path:
    """Return a local path of the first file of `names` that the hub repository has; a cached copy needs no network.

    Raises UserError that ends in `advice` when nothing can be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    try:
        cached = [try_to_load_from_cache(repo, name) for name in names]
        for path in cached:
            if isinstance(path, str):
                return Path(path)
        _reach_hub()
        for name in names:
            try:
                return Path(within(download_seconds(), partial(hf_hub_download, repo, name)))
            except EntryNotFoundError:
                continue
    except Exception as error:  # the hub's client raises its own, its transport's and ValueErrors for bad names
        raise UserError(f"could not fetch '{repo}' from the Hugging Face hub ({brief(error)}): {advice}") from error
    raise UserError(f"'{repo}' on the Hugging Face hub has none of the files {', '.join(names)}: {advice}")


def tag_file(tag: dict[str, Any], *, advice: str) -> Path:
    """Return a local path of the weights that an open_clip pretrained tag's config names."""
    location = str(tag.get("hf_hub") or "")
    if location:
        repo, _, name = location.rpartition("/")
        safe = Path(name).with_suffix(".safetensors").name if name else ""
        return hub_file(repo, [safe, name] if name else WEIGHT_NAMES, advice=advice)
    from open_clip.pretrained import download_pretrained

    try:
        return Path(within(download_seconds(), partial(download_pretrained, tag)))
    except Exception as error:  # urllib's, the checksum's RuntimeError
        raise UserError(f"could not fetch '{tag.get('url')}' ({brief(error)}): {advice}") from error


def _reach_hub() -> None:
    # The client itself retries each of several files for half a minute; one short question fails at once.
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.utils import get_session

    within(_SHORT, lambda: get_session().head(ENDPOINT, timeout=10))


def brief(error: BaseException, *, limit: int = 160) -> str:
    """Return the first line of an error, cut to `limit` characters; its type where it says nothing.

    Example:
        >>> brief(ValueError("no such thing\\nand a long story"))
        'no such thing'
        >>> brief(KeyError())
        'KeyError'
    """
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = without_secrets(line)
    return line if len(line) <= limit else line[: limit - 3] + "..."


# The tensors of a TorchScript archive, as OpenAI publishes CLIP, taken from its records; its code is not read

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

"""The files of a model of the transformers library: found, and refused before anything of them could run."""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from robustvlm.core.files import read_bytes, read_json, read_object
from robustvlm.core.network import download_seconds, within
from robustvlm.errors import MissingExtra, UserError
from robustvlm.models.weights import _reach_hub as reach_hub
from robustvlm.models.weights import brief

PREFIX = "transformers:"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""All that decides how a text becomes token ids."""
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
ALIGNMENT = "align.safetensors"
CHAT_FILES = ("chat_template.jinja", "chat_template.json")
"""How a question is written for a language model."""
_WORDS = (*TOKENIZER_FILES, *CHAT_FILES, "generation_config.json")
_FETCHED = (CONFIG, WEIGHTS, INDEX, "model-*-of-*.safetensors", ALIGNMENT, *_WORDS, *IMAGE_FILES)
# A merges file of a million tokens takes 30 MB as JSON.
_MOST = 2**28


def split_sides(text: str) -> tuple[str, str | None]:
    """Split IMAGE_SIDE@TEXT_SPEC, as it stands behind the prefix; a folder whose path holds an @ stays whole.

    Example:
        >>> split_sides("facebook/dinov2-small@tiny"), split_sides("org/clip")
        (('facebook/dinov2-small', 'tiny'), ('org/clip', None))
    """
    if "@" not in text or os.path.isdir(os.path.expanduser(text)):
        return text, None
    places = [place.start() for place in re.finditer("@", text)]
    cut = next((place for place in places if os.path.isdir(os.path.expanduser(text[:place]))), places[0])
    return text[:cut], text[cut + 1 :]


def model_folder(name: str, prefix: str = PREFIX) -> Path:
    """Return the local folder of a model: the user's own, or what is kept of a repository on the hub, fetched once.

    Args:
        prefix: with which a spec of its kind begins.

    Raises:
        UserError: no such folder, or the repository is out of reach.
    """
    place = os.path.expanduser(name)
    if os.path.isdir(place):
        return Path(place)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"no folder at '{name}': write {prefix}FOLDER, or {prefix}ORG/REPO for one on the hub")
    import huggingface_hub

    # Files of other frameworks and pickles stay where they are.
    fetch = partial(huggingface_hub.snapshot_download, name, allow_patterns=list(_FETCHED))
    with contextlib.suppress(Exception):  # nothing is kept, or only a part
        kept = Path(fetch(local_files_only=True))
        if (kept / CONFIG).is_file() and ((kept / WEIGHTS).is_file() or (kept / INDEX).is_file()):
            return kept
    try:
        with quiet():
            reach_hub()
            return Path(within(download_seconds(), fetch))
    except Exception as error:  # the hub's client raises its own, its transport's and ValueErrors for bad names
        raise UserError(
            f"could not fetch '{name}' from the Hugging Face hub ({brief(error)}): check the network and the name, "
            f"or pass a folder that holds it, as {PREFIX}FOLDER"
        ) from error


def read_config(folder: Path, spec: str) -> dict[str, Any]:
    """Return what `config.json` says, after a look at every file that could name code.

    Raises:
        UserError: no config, a file that asks for code of its own, quantised weights, or no safetensors.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"'{spec}' names no model of transformers: expected {CONFIG} and {WEIGHTS} in '{folder}'")
    config = read_object(folder / CONFIG, parts=("vision_config", "text_config"))
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"'{folder / CONFIG}' names no model_type: expected a config of the transformers library")
    for name in (CONFIG, "tokenizer_config.json", *IMAGE_FILES):
        content = config if name == CONFIG else read_json(folder / name) if (folder / name).is_file() else {}
        if _asks_for_code(content):
            raise UserError(
                f"{name} of '{spec}' asks to run code from its repository (auto_map): refused; write it as an encoder "
                "of your own, module:callable, if you trust it (docs/models.md)"
            )
    if config.get("quantization_config"):
        raise UserError(f"the weights of '{spec}' are quantised: pass the full ones, which gradients can pass through")
    _require_weights(folder, spec)
    return config


def _asks_for_code(content: Any) -> bool:
    if isinstance(content, dict):
        return bool(content.get("auto_map")) or any(_asks_for_code(value) for value in content.values())
    return False


def _require_weights(folder: Path, spec: str) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if not (folder / INDEX).is_file():
        raise UserError(
            f"'{spec}' has no weights as safetensors: expected {WEIGHTS} in '{folder}'; files that are unpickled are "
            "not read: save it again with save_pretrained"
        )
    listed = (read_object(folder / INDEX, parts=("weight_map",)).get("weight_map") or {}).values()
    shards = {str(name) for name in listed}
    lost = sorted(name for name in shards if os.path.basename(name) != name or not (folder / name).is_file())
    if lost or not shards:
        raise UserError(
            f"'{folder / INDEX}' names {lost[0] if lost else 'no file'}, which is not there: fetch it again"
        )


def require_tokenizer(folder: Path, spec: str) -> None:
    """Refuse a folder without a vocabulary: some tokenizers would be made from nothing, and know no word."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"'{spec}' has no tokenizer: put tokenizer.json and tokenizer_config.json into '{folder}'")


def tokenizer_digest(folder: Path) -> str:
    """Return a digest of the names and contents of all tokenizer files."""
    digest = hashlib.blake2b(digest_size=16)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = read_bytes(folder / name, most=_MOST)
            digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


_PASSING = ("_name_or_path", "torch_dtype", "dtype", "transformers_version")


def config_text(config: dict[str, Any]) -> str:
    """Return a config as one text without what says nothing of the model, such as the version that wrote it.

    Example:
        >>> config_text({"model_type": "clip", "transformers_version": "5.0.0"})
        '{"model_type": "clip"}'
    """

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(one) for key, one in value.items() if key not in _PASSING}
        return value

    return json.dumps(bare(config), sort_keys=True)


def library() -> Any:
    """Return the transformers package; where it is missing or too old, one line says what to install."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("transformers", extra="hub") from error
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if (major, minor) < (4, 57):
        raise UserError(
            f"transformers is {transformers.__version__}, expected 4.57 or later: pip install 'robustvlm[hub]'"
        )
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence notes and bars of transformers and of the hub's client: what matters of them is checked by us."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = not are_progress_bars_disabled()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    disable_progress_bars()
    try:
        with _no_bars():
            yield
    finally:
        logging.disable(before)
        if bars:
            enable_progress_bars()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    try:
        from transformers.utils import logging as bars
    except ImportError:
        yield
        return
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()

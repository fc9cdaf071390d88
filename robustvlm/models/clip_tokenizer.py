"""The tokenizer of an open_clip model: its own merges file where it has one, and whether it fits the text tower."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustvlm.core.reading import MOST_BYTES, NotRegular, read_json, require_regular
from robustvlm.errors import UserError
from robustvlm.models.hub import CONFIG_NAME

Tokenizer = Callable[[list[str]], torch.Tensor]
_FOLDER = "local-dir:"
# A vocabulary of transformers may be padded to a round number of rows, or lack reserved ones; CLIPA's fills 95 %.
_FILLED = 0.8


def load_tokenizer(source: str, folder_source: str, spec: str) -> Tokenizer:
    """Return open_clip's tokenizer for `source`, with the merges file of the model's folder if that has one.

    Raises UserError when the merges file is damaged, or when several lie there and the config names none.
    """
    import open_clip

    bpe = bpe_file(Path(folder_source.removeprefix(_FOLDER)), spec) if folder_source.startswith(_FOLDER) else None
    if bpe is not None:
        _check_merges(bpe, spec)
    # open_clip takes a merges file's path as it stands, so the folder has to be part of it.
    return open_clip.get_tokenizer(source, **({"bpe_path": str(bpe)} if bpe else {}))


def bpe_file(folder: Path, spec: str) -> Path | None:
    """Return the merges file of a model folder: the one its config names, else the only bpe_*.txt.gz beside it."""
    config = read_json(folder / CONFIG_NAME)
    text = config.get("model_cfg", {}).get("text_cfg", {})
    named = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if named:
        # A folder that was moved, or came from another machine, has the file beside its config.
        return next((path for path in (folder / Path(named).name, folder / named) if path.is_file()), folder / named)
    if text.get("hf_tokenizer_name"):
        return None
    found = sorted(folder.glob("bpe_*.txt.gz"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"model '{spec}' has several merges files ({names}): name one as text_cfg.tokenizer_kwargs.bpe_path"
        )
    return found[0] if found else None


def _check_merges(path: Path, spec: str) -> None:
    try:
        require_regular(path)
        with gzip.open(path) as file:
            if len(content := file.read(MOST_BYTES + 1)) > MOST_BYTES:
                raise NotRegular("it unpacks to more than any merges file holds")
        content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"model '{spec}' names the merges file '{path}', which is not there") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"the merges file '{path}' of model '{spec}' is damaged ({error}): fetch it again") from None


def check_vocabulary(tokenizer: Tokenizer, model: Any, text: dict[str, Any], spec: str) -> None:
    """Refuse a tokenizer that knows more tokens than the text tower, or fewer than it was trained with.

    A merges file that is cut short reads well and numbers every token anew. CLIP's own kind of tokenizer has to fit
    exactly; a vocabulary of transformers may leave a part of the rows unused.
    """
    room = _rows(model, text)
    ids = getattr(tokenizer, "encoder", None)
    inner = getattr(tokenizer, "tokenizer", None)
    if isinstance(ids, dict) and ids:
        known, least = max(ids.values()) + 1, room
    elif inner is not None and hasattr(inner, "__len__"):
        known, least = len(inner), int(_FILLED * room)
    else:
        return
    if known > room or known < least:
        remedy = (
            "put the merges file it was trained with beside its config as bpe_NAME.txt.gz"
            if isinstance(ids, dict)
            else "put the tokenizer files it was trained with beside its config"
        )
        raise UserError(f"model '{spec}' has room for {room} tokens, but its tokenizer knows {known}: {remedy}")


def _rows(model: Any, text: dict[str, Any]) -> int:
    """Return the number of token embeddings of the text tower."""
    embeddings = getattr(getattr(getattr(model, "text", None), "transformer", None), "get_input_embeddings", None)
    if text.get("hf_model_name") and callable(embeddings):
        return len(embeddings().weight)
    return int(text.get("vocab_size", 49408))
